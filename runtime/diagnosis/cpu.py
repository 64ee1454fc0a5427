"""The processor, its memory, and the C kernels."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.diagnosis import Finding
from runtime.diagnosis.measure import probed, read_rate

if TYPE_CHECKING:
    from kernels_c.backend import CpuBackend

AREA = "cpu"
X86 = platform.machine().lower() in ("x86_64", "amd64")
COMPILERS = ("cc", "gcc", "clang")
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni")  # that a reader may ask about
SLOW_GBPS = 4.0  # below this, something is odd: one core of a small cloud machine reads 10 GB/s


def findings(needed: bool = True) -> Iterator[Finding]:
    """The processor, the kernels' build, threads, memory, and every operation on every instruction set.

    needed: whether nothing runs without the C kernels; where a GPU works, only encoders do not.
    """
    yield _processor()
    try:
        from kernels_c.isa import available_isas, choose_isa
    except RuntimeError as error:  # KernelError: they are not built
        yield Finding(AREA, "C kernels", "fail" if needed else "warn", str(error), _build_advice())
        return
    isas = available_isas()
    yield _instruction_sets(isas)
    try:
        chosen = choose_isa()
    except RuntimeError as error:
        yield Finding(AREA, "COCKTAIL_ISA", "fail", str(error), "unset it, or choose one of these")
        return
    from kernels_c.backend import CpuBackend
    from kernels_c.encoder import CpuEncoder

    try:
        backend = CpuBackend(isa=chosen)
        yield _threads(backend)
        yield from _memory(backend)
        for isa in isas:
            yield from probed(AREA, f"kernels, {isa}", CpuBackend(threads=1, isa=isa), CpuEncoder(threads=1, isa=isa))
    except RuntimeError as error:  # KernelError: of a build that is older than these sources
        yield Finding(AREA, "kernels", "fail", str(error), _build_advice())


def _processor() -> Finding:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): text.strip() for name, text in fields.items()}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = [flag for flag in FEATURES if flag in fields.get("flags", "").split()]
    return Finding(AREA, "processor", "pass", f"{name}: {', '.join(flags) or 'no features known'}")


def _instruction_sets(isas: tuple[str, ...]) -> Finding:
    found = f"built, and this processor runs {', '.join(isas)}"
    if isas == ("scalar",) and not X86:
        return Finding(AREA, "C kernels", "warn", found, "nothing: only x86-64 has vector code so far")
    if isas == ("scalar",):
        return Finding(AREA, "C kernels", "warn", found, "without AVX2 everything is several times slower; use a "
                       "processor that has it, and in a virtual machine pass the host's processor on")
    if forced := os.environ.get("COCKTAIL_ISA"):
        return Finding(AREA, "C kernels", "warn", f"{found}; COCKTAIL_ISA is {forced}", f"unset it for {isas[-1]}")
    return Finding(AREA, "C kernels", "pass", f"{found}; {isas[-1]} is used")


def _threads(backend: CpuBackend) -> Finding:
    from kernels_c.machine import usable_cores

    return Finding(AREA, "threads", "pass", f"{usable_cores()} cores usable, {os.cpu_count()} logical processors; "
                   f"{backend.threads} for arithmetic and {backend.streaming_threads} for streaming, as measured now")


def _memory(backend: CpuBackend) -> Iterator[Finding]:
    from kernels_c.machine import available_bytes

    free = available_bytes()
    if free is None:
        yield Finding(AREA, "memory", "warn", "the system does not say how much is free",
                      "watch it: an allocation that does not fit may end the process")
    else:
        yield Finding(AREA, "memory", "pass" if free >= 2**30 else "warn", f"{free / 2**30:.2f} GiB free",
                      "" if free >= 2**30 else "close other programs; a model of 1B parameters takes 2 GiB", free)
    rate = read_rate(backend, free)
    if rate is None:
        yield Finding(AREA, "memory rate", "warn", "too little memory is free to measure it", "free some")
    else:
        yield Finding(AREA, "memory rate", "pass" if rate >= SLOW_GBPS else "warn",
                      f"{rate:.1f} GB/s read by one matrix product; weights plus cache over this is the least time of "
                      "a token", "" if rate >= SLOW_GBPS else "other programs may be using the memory; try again",
                      1e9 * rate)


def _build_advice() -> str:
    if any(map(shutil.which, COMPILERS)):
        return "build them: pip install . in the source's folder, or python -m kernels_c.build"
    return (f"there is no C compiler either (looked for {', '.join(COMPILERS)}): install a wheel, which needs none, or "
            "GCC 12 or later, then pip install .")
