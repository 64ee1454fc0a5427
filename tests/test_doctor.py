"""cocktail.doctor: what it looks at, each failure simulated, and what it says of a model's fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_model import save_tiny_model

import kernels_c.isa
import kernels_c.machine
from cocktail import doctor
from cocktail.fit import cache_bytes, fit, prefill_bytes, step_bytes
from kernels_c.backend import CpuBackend
from kernels_c.errors import KernelError
from kernels_cu import build
from kernels_cu.errors import NoDevice
from runtime.backend import load_backend
from runtime.checkpoint import Checkpoint
from runtime.diagnosis import Finding, cpu, cuda, measure
from runtime.errors import BackendError
from runtime.model import Model, prefill
from runtime.weights import load_weights

ROOT = Path(__file__).parents[1]
FAST = CpuBackend(threads=1)


def by_subject(findings: Any) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


# The processor -----------------------------------------------------------------------------------------------------

@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes have tests of their own; threads are not measured."""
    monkeypatch.setattr(cpu, "probed", lambda *_: iter(()))
    monkeypatch.setattr("kernels_c.threads._measured", lambda isa: (1, 1))
    monkeypatch.setattr(measure, "ROWS", 256)


def test_a_good_processor_passes(quick, monkeypatch):
    monkeypatch.delenv("COCKTAIL_ISA", raising=False)
    monkeypatch.setattr(cpu, "SLOW_GBPS", 0.0)
    found = by_subject(cpu.findings())
    assert {finding.status for finding in found.values()} == {"pass"}
    assert found["memory"].value == pytest.approx(kernels_c.machine.available_bytes(), rel=0.5)
    assert found["memory rate"].value > 0


def test_no_avx(quick, monkeypatch):
    monkeypatch.setattr(kernels_c.isa, "available_isas", lambda: ("scalar",))
    monkeypatch.setattr(cpu, "X86", True)
    found = by_subject(cpu.findings())["C kernels"]
    assert found.status == "warn"
    assert "AVX2" in found.advice
    monkeypatch.setattr(cpu, "X86", False)
    assert "only x86-64" in by_subject(cpu.findings())["C kernels"].advice


def test_an_instruction_set_that_is_not_there(quick, monkeypatch):
    monkeypatch.setenv("COCKTAIL_ISA", "mmx")
    assert by_subject(cpu.findings())["COCKTAIL_ISA"].status == "fail"


def test_too_little_memory(quick, monkeypatch):
    monkeypatch.setattr(measure, "ROWS", 8192)
    monkeypatch.setattr(kernels_c.machine, "available_bytes", lambda: 100 << 20)
    found = by_subject(cpu.findings())
    assert (found["memory"].status, found["memory"].found) == ("warn", "0.10 GiB free")
    assert found["memory rate"].status == "warn"


@pytest.mark.parametrize(("folder", "advice"), [("/nonexistent", "there is no C compiler either"),
                                                (None, "build them")])
def test_without_the_c_kernels(tmp_path, folder, advice):
    """In a process of its own, with and without a compiler; nothing can run, so the exit code is 1."""
    if folder is None:
        (tmp_path / "cc").write_text("")
        (tmp_path / "cc").chmod(0o755)
    script = ("import sys; sys.modules['kernels_c._kernels'] = None; from cocktail.doctor import main; "
              "sys.exit(main(['--json']))")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, timeout=60,
                          env=os.environ | {"PATH": folder or str(tmp_path), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1, done.stderr
    (found,) = [each for each in json.loads(done.stdout)["findings"] if each["subject"] == "C kernels"]
    assert found["status"] == "fail"
    assert "the C kernels are not built" in found["found"]
    assert advice in found["advice"]


def test_kernels_of_older_sources(quick, monkeypatch):
    """As after a pull without a build: the extension loads, but lacks an operation."""
    class Old:
        def __getattr__(self, name: str) -> Any:
            if name.startswith("append_"):
                raise AttributeError(name)
            return getattr(whole, name)

    whole = kernels_c.isa.lib
    monkeypatch.setattr(kernels_c.isa, "lib", Old())
    *_, found = cpu.findings()
    assert (found.subject, found.status) == ("kernels", "fail")
    assert "built from older sources: they have no append_" in found.found
    with pytest.raises(KernelError, match="build them again"):
        CpuBackend(threads=1)


def test_where_a_gpu_works_the_c_kernels_are_wanted_but_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels_c.isa", None)
    with pytest.raises(ImportError):
        list(cpu.findings())  # a module that is not there is a bug, not a finding
    monkeypatch.setitem(sys.modules, "kernels_c.isa", _Unbuilt("kernels_c.isa"))
    assert [finding.status for finding in cpu.findings(needed=False)][1:] == ["warn"]
    assert [finding.status for finding in cpu.findings()][1:] == ["fail"]


class _Unbuilt(SimpleNamespace):
    def __init__(self, name: str) -> None:
        super().__init__(__name__=name)

    def __getattr__(self, name: str) -> Any:
        raise KernelError("the C kernels are not built")


# The GPU -----------------------------------------------------------------------------------------------------------

def fake_cupy(major: int = 9, minor: int = 0) -> Any:
    runtime = SimpleNamespace(
        getDeviceCount=lambda: 1, getDevice=lambda: 0, CUDARuntimeError=RuntimeError, driverGetVersion=lambda: 12080,
        getDeviceProperties=lambda device: {"name": b"Test GPU", "major": major, "minor": minor},
        memGetInfo=lambda: (60 << 30, 80 << 30))
    return SimpleNamespace(__version__="99.0", cuda=SimpleNamespace(runtime=runtime))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CuPy with one GPU, whose kernels cannot run."""

    def use(**properties: int) -> None:
        cupy = fake_cupy(**properties)
        monkeypatch.setattr(build, "import_cupy", lambda: cupy)
        build.architecture_of.cache_clear()

    use()
    yield use
    build.architecture_of.cache_clear()


def test_no_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    build.import_cupy.cache_clear()
    (found,) = cuda.findings()
    build.import_cupy.cache_clear()
    assert (found.subject, found.status) == ("CuPy", "warn")
    assert "CuPy cannot be imported" in found.found
    assert "cocktail-kv[cuda13]" in found.advice


def test_cupy_under_a_home_that_cannot_be_written(monkeypatch):
    class ReadOnly:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name == "cupy":
                raise PermissionError(13, "Permission denied", "/root/.cupy")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [ReadOnly, *sys.meta_path])
    build.import_cupy.cache_clear()
    (found,) = cuda.findings()
    with pytest.raises(BackendError, match="CUPY_CACHE_DIR; or use --backend cpu"):
        load_backend("auto")
    build.import_cupy.cache_clear()
    assert (found.subject, found.status) == ("CuPy", "fail")
    assert "/root/.cupy" in found.found


def test_no_gpu(gpu, monkeypatch):
    def none() -> int:
        raise NoDevice("the CUDA driver shows no GPU")

    monkeypatch.setattr(build, "current_device", none)
    *_, found = cuda.findings()
    assert (found.subject, found.status, found.found) == ("GPU", "warn", "the CUDA driver shows no GPU")
    assert "the CPU does everything" in found.advice


def test_an_old_gpu(gpu):
    gpu(major=7, minor=5)
    *before, found = cuda.findings()
    assert (found.subject, found.status) == ("architecture", "fail")
    assert "compute capability 7.5" in found.found
    assert by_subject(before)["GPU"].found == "Test GPU; driver for CUDA 12.8"
    assert by_subject(before)["memory"].value == 60 << 30


def test_a_gpu_newer_than_the_kernels(gpu):
    gpu(major=12)
    findings = cuda.findings()
    assert [next(findings).subject for _ in range(3)] == ["CuPy", "GPU", "memory"]
    assert next(findings).status == "warn"


def test_no_nvrtc(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", SimpleNamespace())
    build._nvrtc.cache_clear()
    *_, found = cuda.findings()
    build._nvrtc.cache_clear()
    assert (found.subject, found.status) == ("NVRTC", "fail")
    assert "cannot be loaded" in found.found
    assert "cocktail-kv[cuda13]" in found.advice


def test_gpu_kernels_that_cannot_start(gpu, monkeypatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise build.ToolkitMissing("cuBLAS cannot be loaded")

    monkeypatch.setattr(build, "nvrtc_version", lambda: (12, 8))
    monkeypatch.setattr("kernels_cu.backend.CudaBackend.__init__", broken)
    *_, found = cuda.findings()
    assert (found.subject, found.status, found.found) == ("kernels", "fail", "cuBLAS cannot be loaded")


# The model ---------------------------------------------------------------------------------------------------------

def machine(free: int, area: str = "cpu") -> list[Finding]:
    return [Finding(area, "memory", "pass", "", value=free), Finding(area, "memory rate", "pass", "", value=1e9)]


def sizes(path: Path) -> tuple[int, int, dict[str, int]]:
    """Bytes of weights, of the prefill of 4,000 tokens, of their cache at each width."""
    with Checkpoint.open(path) as checkpoint:
        return checkpoint.nbytes, prefill_bytes(checkpoint.config, 4096), cache_bytes(checkpoint.config, 4000)


def test_fit(path):
    _, prefill, caches = sizes(path)
    assert caches["FP16"] > caches["K8V8"] > caches["K4V4"] > caches["budget"]
    for free, status, text in ((1 << 30, "pass", "1.00 GiB free; a token takes at least"),
                               (prefill + caches["FP16"], "warn", "weights would be read from the disk"),
                               (prefill + caches["K8V8"], "warn", "FP16 does not fit; K8V8 does"),
                               (prefill + caches["budget"] - 1, "fail", "it does not fit")):
        found = by_subject(fit(path, 4000, machine(free)))
        assert found["checkpoint"].status == found["tokenizer"].status == "pass"
        line = found["4,000 tokens, cpu"]
        assert line.status == status
        assert text in line.found + line.advice


def test_no_room_on_the_disk_for_a_second_question(path, monkeypatch):
    monkeypatch.setattr("cocktail.fit.disk_usage", lambda folder: SimpleNamespace(free=1 << 10))
    *_, found = fit(path, 4000, machine(1 << 30))
    assert (found.status, "TMPDIR" in found.advice) == ("warn", True)
    *_, found = fit(path, 4000, machine(1 << 30, "cuda"))
    assert found.status == "pass"
    monkeypatch.undo()
    monkeypatch.setenv("TMPDIR", "/nowhere")
    *_, found = fit(path, 4000, machine(1 << 30))
    assert (found.status, "/nowhere has 0.0 MiB left" in found.advice) == ("warn", True)


def test_on_a_gpu_the_weights_must_fit_too(path):
    weights, prefill, caches = sizes(path)

    def status(free: int) -> str:
        *_, found = fit(path, 4000, machine(free, "cuda"))
        return found.status

    assert status(weights + prefill + caches["FP16"]) == "pass"
    assert status(weights + prefill + caches["budget"]) == "warn"
    assert status(weights + prefill + caches["budget"] - 1) == "fail"


def test_several_contexts_without_a_choice(path):
    assert [*by_subject(fit(path, None, machine(1 << 30)))][2:] == ["4,096 tokens, cpu", "7,840 tokens, cpu"]


def test_a_model_that_is_not_there_and_a_context_beyond_it(path):
    (found,) = fit("nowhere", None, [])
    assert (found.status, found.found) == ("fail", "nowhere: no such file or folder")
    *_, found = fit(path, 10_000, machine(1 << 30))
    assert found.status == "fail"
    assert "the model has 8,192 positions" in found.found


def test_a_model_with_too_few_positions_for_any_document(tmp_path):
    short = save_tiny_model(tmp_path, max_position_embeddings=256)
    *_, found = fit(short, None, machine(1 << 30))
    assert (found.subject, found.status) == ("32 tokens", "fail")
    assert "the model has 256 positions" in found.found


def test_the_least_time_of_a_token(tmp_path, path):
    """Bytes over the rate: every weight but an embedding that is not the head, and what the cache holds by then."""
    untied = save_tiny_model(tmp_path, tie_word_embeddings=False)
    with Checkpoint.open(untied) as other, Checkpoint.open(path) as tied:
        assert step_bytes(other) == step_bytes(tied) == tied.nbytes < other.nbytes
        config, weights = tied.config, tied.nbytes
    tokens = 4 * config.n_layers * config.n_kv_heads * config.head_dim * 256
    floor = (weights + cache_bytes(config, 4000)["budget"] - tokens) / 1e9
    *_, found = fit(path, 4000, machine(1 << 30))
    assert f"at least {1e3 * floor:.1f} ms" in found.found


def test_the_prefills_estimate_is_what_it_allocates(path):
    """Within a tenth and a little: what is not counted are ids, positions and logits."""
    with Checkpoint.open(path) as checkpoint:
        engine = Model(checkpoint.config, load_weights(checkpoint, FAST), FAST)
    counted = 0

    class Counting(CpuBackend):
        def empty(self, shape, dtype):
            nonlocal counted
            counted += int(np.prod(shape)) * np.dtype(dtype).itemsize
            return super().empty(shape, dtype)

        def upload(self, data):
            nonlocal counted
            counted += data.nbytes
            return super().upload(data)

    engine, tokens = replace(engine, backend=Counting(threads=1)), 3000
    ids, rope = np.ones(tokens + 96, int).tolist(), engine.rope(tokens + 96, tokens + 352)
    logits = engine.backend.empty((1, engine.config.vocab_size), np.float32)
    next(iter(prefill(engine, ids, rope, (), logits, 2048)))
    assert 0.9 * counted - 50_000 < prefill_bytes(engine.config, tokens + 96) < 1.1 * counted + 50_000


# The command -------------------------------------------------------------------------------------------------------

@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    findings = [Finding("cpu", "C kernels", "pass", "built"), *machine(1 << 30),
                Finding("cuda", "CuPy", "warn", "missing", "pip install 'cocktail-kv[cuda13]'")]
    monkeypatch.setattr("runtime.diagnosis.diagnose", lambda: iter(findings))
    return findings


def test_the_table_shows_every_line_and_what_to_do(found, capsys, path):
    assert doctor.main([str(path)]) == 0
    out, err = capsys.readouterr()
    for text in ("cpu: C kernels", "built", "-> pip install 'cocktail-kv[cuda13]'", "model: 4,096 tokens, cpu",
                 "warnings: 1; failed: 0"):
        assert text in out
    assert err == ""


def test_a_failure_is_exit_code_1(found, capsys):
    found.append(Finding("cpu", "kernels, avx2", "fail", "wrong", "report it"))
    assert doctor.main([]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_json(found, capsys, path):
    assert doctor.main([str(path), "--context-tokens", "100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["findings"][3] == {"area": "cuda", "subject": "CuPy", "status": "warn", "found": "missing",
                                   "advice": "pip install 'cocktail-kv[cuda13]'", "value": None}
    assert [each["subject"] for each in told["findings"]][-1] == "100 tokens, cpu"


def test_a_model_that_is_not_there_fails(found, capsys):
    assert doctor.main(["nowhere"]) == 1
    assert "nowhere: no such file or folder" in capsys.readouterr().out


def test_a_context_without_a_model_is_an_error(capsys):
    assert doctor.main(["--context-tokens", "100"]) == 2
    assert capsys.readouterr().err.startswith("error: --context-tokens is about a model")
