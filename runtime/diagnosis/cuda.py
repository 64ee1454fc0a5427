"""The NVIDIA GPU: CuPy, driver, NVRTC, architecture, kernels. Without one the CPU does everything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from runtime.diagnosis import Finding
from runtime.diagnosis.measure import probed, read_rate

AREA = "cuda"
EXTRA = "pip install 'cocktail-kv[cuda13]', or [cuda12] for an older driver"


def findings() -> Iterator[Finding]:
    """In the order in which one needs the other; the first that is missing is the last."""
    from kernels_cu import build
    from kernels_cu.errors import ArchitectureTooOld, CupyMissing, KernelError

    try:
        cupy = build.import_cupy()
    except CupyMissing as error:
        yield Finding(AREA, "CuPy", "warn", str(error), f"nothing, if there is no NVIDIA GPU; else {EXTRA}")
        return
    except KernelError as error:
        yield Finding(AREA, "CuPy", "fail", str(error), "or give --backend cpu")
        return
    yield Finding(AREA, "CuPy", "pass", cupy.__version__)
    try:
        device = build.current_device()
    except KernelError as error:
        yield Finding(AREA, "GPU", "warn", str(error), "nothing, if there is no NVIDIA GPU: the CPU does everything; "
                      "else install NVIDIA's driver and look at nvidia-smi and CUDA_VISIBLE_DEVICES")
        return
    yield from _gpu(cupy, device)
    try:
        architecture = build.architecture_of(device)
    except ArchitectureTooOld as error:
        yield Finding(AREA, "architecture", "fail", str(error), "give --backend cpu")
        return
    yield _architecture(architecture, build.ARCHITECTURES)
    try:
        version = build.nvrtc_version()
    except KernelError as error:
        yield Finding(AREA, "NVRTC", "fail", str(error), f"{EXTRA}; or give --backend cpu")
        return
    yield Finding(AREA, "NVRTC", "pass", "{}.{}".format(*version))
    try:
        from kernels_cu.backend import CudaBackend

        backend = CudaBackend()
        yield from _rate(backend)
        yield from probed(AREA, f"kernels, sm_{architecture}", backend)
    except (RuntimeError, MemoryError, OSError) as error:
        yield Finding(AREA, "kernels", "fail", " ".join(str(error).split()), f"{EXTRA}; or give --backend cpu")


def _gpu(cupy: Any, device: int) -> Iterator[Finding]:
    runtime = cupy.cuda.runtime
    free, total = runtime.memGetInfo()
    driver = runtime.driverGetVersion()
    name = runtime.getDeviceProperties(device)["name"].decode()
    yield Finding(AREA, "GPU", "pass", f"{name}; driver for CUDA {driver // 1000}.{driver % 1000 // 10}")
    yield Finding(AREA, "memory", "pass", f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB free", value=free)


def _architecture(architecture: int, tested: tuple[int, ...]) -> Finding:
    found = f"compute capability {architecture // 10}.{architecture % 10}"
    if architecture in tested:
        return Finding(AREA, "architecture", "pass", found)
    written_for = ", ".join(f"{each // 10}.{each % 10}" for each in tested)
    return Finding(AREA, "architecture", "warn", f"{found}; the kernels are written for {written_for}",
                   "look at the probes below, and give --backend cpu where one fails")


def _rate(backend: Any) -> Iterator[Finding]:
    rate = read_rate(backend, backend.free_bytes())
    if rate is None:
        yield Finding(AREA, "memory rate", "warn", "too little GPU memory is free to measure it",
                      "end other programs on the GPU (nvidia-smi lists them)")
    else:
        yield Finding(AREA, "memory rate", "pass", f"{rate:,.0f} GB/s read by one matrix product",
                      value=1e9 * rate)
