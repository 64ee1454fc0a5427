"""From .cu sources to loaded kernels: the only place that knows NVRTC and RawModule.

A kernel is named by a Spec: source file, entry point and macro definitions (its specialisation). Includes are inlined,
because nothing that caches compiled code looks inside an included file. NVRTC is called directly: RawModule's own call
adds -ftz=true, which would flush subnormals that the storage formats keep, and it cannot compile for a GPU that is
not there. Compiled code is kept on disk under a hash of everything it depends on.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kernels_cu.errors import ArchitectureTooOld, CupyMissing, KernelError, NoDevice, ToolkitMissing

ARCHITECTURES = (80, 86, 89, 90)  # what the kernels are written for and compiled for in tests
SOURCES = Path(__file__).parent


@dataclass(frozen=True)
class Spec:
    """One specialised kernel: `entry` of `source` (a file beside this one) under `defines` (macro, value)."""

    source: str
    entry: str
    defines: tuple[tuple[str, int | str], ...] = ()

    @classmethod
    def of(cls, source: str, entry: str, **defines: int | str) -> Spec:
        return cls(source, entry, tuple(sorted(defines.items())))

    def __str__(self) -> str:
        values = ",".join(f"{name}={value}" for name, value in self.defines)
        return f"{self.entry}<{values}>" if values else self.entry


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel: registers, bytes of stack and of spills, all per thread; static shared bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def current_device() -> int:
    """Ordinal of the current GPU; NoDevice where there is none."""
    runtime = import_cupy().cuda.runtime
    try:
        if runtime.getDeviceCount():
            return int(runtime.getDevice())
    except runtime.CUDARuntimeError as error:
        raise NoDevice(f"no usable CUDA driver or GPU ({error}); check nvidia-smi") from error
    raise NoDevice("the CUDA driver shows no GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES")


@cache
def architecture_of(device: int) -> int:
    """Compute capability of a GPU as major * 10 + minor; ArchitectureTooOld below the oldest that kernels exist for."""
    properties = import_cupy().cuda.runtime.getDeviceProperties(device)
    architecture = int(properties["major"] * 10 + properties["minor"])
    if architecture < ARCHITECTURES[0]:
        name = properties["name"].decode()
        raise ArchitectureTooOld(
            f"{name} has compute capability {architecture / 10:.1f}; the kernels need at least "
            f"{ARCHITECTURES[0] / 10:.1f} (Ampere); use --backend cpu"
        )
    return architecture


def kernel(spec: Spec, dynamic_shared: int = 0) -> Any:
    """The loaded kernel for the current GPU: call it as kernel(grid, block, args, shared_mem=bytes).

    dynamic_shared: the most bytes of dynamic shared memory it will be launched with. Every scalar argument must be a
    NumPy scalar of the C type: CuPy checks nothing.
    """
    return _load(spec, current_device(), dynamic_shared)


def compile_all(specs: Iterable[Spec], architecture: int | None = None, threads: int | None = None) -> None:
    """Compile ahead, in parallel, what is not on disk yet; needs no GPU where the architecture is given."""
    architecture = architecture or architecture_of(current_device())
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        list(pool.map(lambda spec: compiled(spec, architecture), specs))


def compiled(spec: Spec, architecture: int) -> Path:
    """Path of the kernel's machine code (cubin) for one architecture, compiled if it is not on disk. Needs no GPU."""
    nvrtc = _nvrtc()
    text, options = _text(spec.source), _options(spec, architecture)
    key = hashlib.sha256("\0".join((text, *options, str(nvrtc.getVersion()))).encode()).hexdigest()[:32]
    path = _cache_folder() / f"{spec.entry}-{key}.cubin"
    if not path.exists():
        cubin, log = _compile(nvrtc, spec, text, options)
        _write(path.with_suffix(".log"), log.encode())
        _write(path, cubin)
    return path


def usage(spec: Spec, architecture: int) -> Usage:
    """Registers, stack, spills and shared memory of a kernel, from the compiler's report. Needs no GPU."""
    log = compiled(spec, architecture).with_suffix(".log").read_text()
    report = re.search(
        rf"entry function '{spec.entry}'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)", log, re.DOTALL)  # fmt: skip
    if report is None:
        raise KernelError(f"{spec}: NVRTC reported no resource usage for {spec.entry!r}; its log reads: {log.strip()}")
    stack, stores, loads, registers = (int(number) for number in report.groups()[:4])
    shared = re.search(r"(\d+) bytes smem", report[5])
    return Usage(registers, stack, stores, loads, int(shared[1]) if shared else 0)


@cache
def import_cupy() -> Any:
    """CuPy, or CupyMissing."""
    try:
        import cupy
    except ImportError as error:
        raise CupyMissing(
            f"CuPy cannot be imported ({error}); run: pip install 'cocktail-kv[cuda13]' (or [cuda12], to match the "
            "driver), or use --backend cpu"
        ) from error
    return cupy


@cache
def _load(spec: Spec, device: int, dynamic_shared: int) -> Any:
    cupy = import_cupy()
    function = cupy.RawModule(path=str(compiled(spec, architecture_of(device)))).get_function(spec.entry)
    limit = cupy.cuda.runtime.getDeviceProperties(device)["sharedMemPerBlockOptin"]
    shared = function.shared_size_bytes + dynamic_shared
    if shared > limit:
        raise KernelError(f"{spec} needs {shared:,} bytes of shared memory; this GPU gives a block {limit:,}")
    if dynamic_shared > 48 * 1024:
        function.max_dynamic_shared_size_bytes = dynamic_shared
    return function


@cache
def _nvrtc() -> Any:
    import_cupy()
    try:
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise ToolkitMissing(
            f"NVRTC, the run-time compiler of CUDA, cannot be loaded ({error}); run: pip install nvidia-cuda-nvrtc"
        ) from error
    return nvrtc


def _options(spec: Spec, architecture: int) -> tuple[str, ...]:
    defines = tuple(f"-D{name}={value}" for name, value in (("ARCH", architecture), *spec.defines))
    target = f"sm_{architecture}{'a' if architecture == 90 else ''}"  # sm_90a: with Hopper's warpgroup instructions
    return "--std=c++17", f"-arch={target}", "--ptxas-options=-v", *defines


def _compile(nvrtc: Any, spec: Spec, text: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    program = nvrtc.createProgram(text, spec.source, (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip()
        raise KernelError(f"{spec} does not compile with {' '.join(options)}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


@cache
def _text(source: str) -> str:
    """The source with every `#include "file"` replaced by that file, once."""
    seen: set[str] = set()

    def read(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (SOURCES / name).read_text()
        return re.sub(r'^#include "([^"]+)"\n', lambda match: read(match[1]), text, flags=re.MULTILINE)

    return read(source)


@cache
def _cache_folder() -> Path:
    chosen = os.environ.get("COCKTAIL_KERNEL_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(chosen) if chosen else base / "cocktail" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KernelError(f"cannot keep compiled kernels in {folder} ({error}); set COCKTAIL_KERNEL_CACHE") from error
    return folder


def _write(path: Path, data: bytes) -> None:
    """All or nothing, also where two processes compile the same kernel."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)
