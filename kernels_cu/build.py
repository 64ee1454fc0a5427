"""From .cu sources to loaded kernels: the only place that knows NVRTC and RawModule.

A kernel is named by a Spec: source file, entry point and macro definitions (its specialisation). Includes are inlined,
because nothing that caches compiled code looks inside an included file. NVRTC is called directly: RawModule's own call
adds -ftz=true, which would flush subnormals that the storage formats keep, and it cannot compile for a GPU that is
not there. Compiled code is kept on disk under a hash of everything it depends on.

A kernel whose source calls wait_for_predecessor() (common.cuh) is launched early: on Hopper and later its blocks may
start while those of the kernel before are still running, also in a captured graph. CuPy cannot ask for that, so these
launches go to the driver directly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kernels_cu.errors import ArchitectureTooOld, CupyMissing, KernelError, NoDevice, ToolkitMissing

ARCHITECTURES = (80, 86, 89, 90)  # what the kernels are written for and compiled for in tests
SOURCES = Path(__file__).parent
_EARLY_ARCHITECTURE, _EARLY_DRIVER = 90, 12030  # CUDA 12.3 captures early launches as edges of a graph
_in_order: ContextVar[bool] = ContextVar("in_order", default=False)


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


class Kernel:
    """A loaded kernel; `kernel` is CuPy's function of it."""

    def __init__(self, function: Any, early: bool) -> None:
        self._function, self._early, self.kernel = function, early, function.kernel

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...],
                 shared_mem: int = 0) -> None:  # fmt: skip
        """Launch on the current stream. Every argument must be a NumPy scalar of the C type: nothing checks."""
        if self._early and not _in_order.get():
            _launch_early(self.kernel.ptr, grid, block, args, shared_mem)
        else:
            self._function(grid, block, args, shared_mem=shared_mem)


def kernel(spec: Spec, dynamic_shared: int = 0) -> Kernel:
    """The loaded kernel for the current GPU.

    dynamic_shared: the most bytes of dynamic shared memory it will be launched with.
    """
    return _load(spec, current_device(), dynamic_shared)


@contextmanager
def in_order() -> Iterator[None]:
    """Every kernel launched or captured within starts when the one before has ended: to compare with early launches."""
    token = _in_order.set(True)
    try:
        yield
    finally:
        _in_order.reset(token)


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


def nvrtc_version() -> tuple[int, int]:
    """Of the run-time compiler; ToolkitMissing where it cannot be loaded. Needs no GPU."""
    major, minor = _nvrtc().getVersion()
    return int(major), int(minor)


@cache
def import_cupy() -> Any:
    """CuPy, or CupyMissing; KernelError where it is there but cannot make its folder, as under a read-only HOME."""
    try:
        import cupy
    except ImportError as error:
        raise CupyMissing(
            f"CuPy cannot be imported ({error}); run: pip install 'cocktail-kv[cuda13]' (or [cuda12], to match the "
            "driver), or use --backend cpu"
        ) from error
    except OSError as error:
        raise KernelError(
            f"CuPy cannot make its folder ({error}); name one that can be written in CUPY_CACHE_DIR"
        ) from error
    return cupy


@cache
def _load(spec: Spec, device: int, dynamic_shared: int) -> Kernel:
    cupy = import_cupy()
    function = cupy.RawModule(path=str(compiled(spec, architecture_of(device)))).get_function(spec.entry)
    limit = cupy.cuda.runtime.getDeviceProperties(device)["sharedMemPerBlockOptin"]
    shared = function.shared_size_bytes + dynamic_shared
    if shared > limit:
        raise KernelError(f"{spec} needs {shared:,} bytes of shared memory; this GPU gives a block {limit:,}")
    if shared > 48 * 1024:
        # All there is: CuPy loads a cubin once, so that this may be the function of a launch that needs more.
        function.max_dynamic_shared_size_bytes = limit - function.shared_size_bytes
    waits = "wait_for_predecessor();" in _text(spec.source)
    able = architecture_of(device) >= _EARLY_ARCHITECTURE and cupy.cuda.runtime.driverGetVersion() >= _EARLY_DRIVER
    return Kernel(function, waits and able)


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h; the value is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_LaunchAttribute)),
                ("n_attributes", ctypes.c_uint))  # fmt: skip


_PROGRAMMATIC_STREAM_SERIALIZATION = _LaunchAttribute(6, 0, 1)


def _launch_early(function: int, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...],
                  shared: int) -> None:  # fmt: skip
    values = b"".join(argument.tobytes().ljust(8, b"\0") for argument in args)
    at = ctypes.cast(values, ctypes.c_void_p).value or 0
    addresses = (ctypes.c_void_p * len(args))(*range(at, at + len(values), 8))
    config = _LaunchConfig((*grid, 1, 1)[:3], (*block, 1, 1)[:3], shared,
                           import_cupy().cuda.get_current_stream().ptr,
                           ctypes.pointer(_PROGRAMMATIC_STREAM_SERIALIZATION), 1)  # fmt: skip
    status = driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), addresses, None)
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise KernelError(f"a kernel could not be launched: {(text.value or b'unknown error').decode()} ({status})")


@cache
def driver() -> Any:
    """The CUDA driver's library, for the calls that CuPy does not make."""
    return ctypes.CDLL("libcuda.so.1")


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
