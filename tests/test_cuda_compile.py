"""Every CUDA kernel compiles for every architecture without a GPU, and none of them spills.

Needs CuPy and NVRTC (pip install cupy-cuda13x nvidia-cuda-nvrtc), no driver.
"""

import os

import pytest

pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'cocktail-kv[cuda13]'", exc_type=ImportError)

from cuda_kernels import compile_cover

from kernels_cu import attention, build
from kernels_cu.errors import ArchitectureTooOld, KernelError, NoDevice

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that a block may have


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
def test_everything_compiles_without_spills(architecture, capsys):
    """Of the cache's configurations the newest architecture takes a third and the others a ninth, for time's sake;
    COCKTAIL_ALL_KERNELS=1 takes all (a quarter of an hour)."""
    step = 1 if os.environ.get("COCKTAIL_ALL_KERNELS") == "1" else 3 if architecture == build.ARCHITECTURES[-1] else 9
    specs = list(compile_cover(architecture, step))
    build.compile_all(specs, architecture)
    usages = {spec: build.usage(spec, architecture) for spec in specs}
    with capsys.disabled():
        print(f"\nsm_{architecture}: {len(specs)} kernels; the most registers: "
              + ", ".join(f"{spec.entry} {used.registers}" for spec, used in heaviest(usages).items()))
    spilling = {str(spec): used for spec, used in usages.items() if used.spill_stores or used.spill_loads or used.stack}
    assert not spilling


def test_hopper_matrix_instructions_overlap():
    """ptxas serializes warpgroup instructions, at half the speed and with a mere remark, where it sees a dependency."""
    hopper = [tile for tile in attention.tiles(90) if tile.hopper]
    assert {tile.D for tile in hopper} == {64, 128}
    for tile in hopper:
        assert "serialized" not in build.compiled(tile.spec(), 90).with_suffix(".log").read_text()


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
def test_prefill_attention_fits_shared_memory(architecture):
    for tile in attention.tiles(architecture):
        assert tile.shared_bytes <= SHARED_LIMIT[architecture], tile


def test_a_spec_names_its_specialisation():
    assert str(build.Spec.of("gemv.cu", "gemv", TEAM=2, CHUNKS=3)) == "gemv<CHUNKS=3,TEAM=2>"
    assert str(build.Spec.of("advance.cu", "advance")) == "advance"


def test_a_kernel_that_does_not_compile_says_why():
    broken = build.Spec.of("embed.cu", "embed", WEIGHT="F8")
    with pytest.raises(KernelError, match=r"embed<WEIGHT=F8> does not compile with .*-arch=sm_90"):
        build.compiled(broken, 90)


def test_included_files_are_part_of_the_key(monkeypatch, tmp_path):
    """The bug this prevents: editing a header and running the old kernel."""
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    (tmp_path / "one.cuh").write_text("#define VALUE 1\n")
    (tmp_path / "k.cu").write_text('#include "one.cuh"\nextern "C" __global__ void k(int *p) { *p = VALUE; }\n')
    spec = build.Spec.of("k.cu", "k")
    build._text.cache_clear()
    first = build.compiled(spec, 90)
    (tmp_path / "one.cuh").write_text("#define VALUE 2\n")
    build._text.cache_clear()
    assert build.compiled(spec, 90) != first
    build._text.cache_clear()


def test_no_gpu_and_an_old_gpu_are_different_errors(monkeypatch):
    class Runtime:
        CUDARuntimeError = RuntimeError
        devices = 0

        def getDeviceCount(self):
            if self.devices is None:
                raise RuntimeError("driver version is insufficient")
            return self.devices

        def getDeviceProperties(self, device):
            return {"major": 7, "minor": 5, "name": b"Tesla T4"}

    class Cupy:
        class cuda:
            runtime = Runtime()

    monkeypatch.setattr(build, "import_cupy", Cupy)
    with pytest.raises(NoDevice, match="shows no GPU"):
        build.current_device()
    Runtime.devices = None
    with pytest.raises(NoDevice, match="driver version is insufficient"):
        build.current_device()
    with pytest.raises(ArchitectureTooOld, match=r"Tesla T4 has .* 7\.5; the kernels need at least 8\.0"):
        build.architecture_of.__wrapped__(0)


def heaviest(usages):
    """Of each entry point the specialisation with the most registers."""
    top = {}
    for spec, used in sorted(usages.items(), key=lambda item: item[1].registers):
        top[spec.entry] = spec, used
    return dict(top.values())
