"""Which compiled variant of each operation runs on this processor."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from kernels_c.errors import KernelError

try:
    from kernels_c._kernels import ffi, lib
except ImportError as error:
    raise KernelError(
        f"the C kernels are not built ({error}); install the package or run: python -m kernels_c.build"
    ) from error

__all__ = ["available_isas", "choose_isa", "ffi", "lib", "operation"]

_ISAS = ("scalar", "avx2", "avx512")  # the order of enum isa in src/common.h


def available_isas() -> tuple[str, ...]:
    """Instruction sets that are both built and supported by this processor, narrowest first."""
    best = lib.cpu_isa()
    return tuple(isa for level, isa in enumerate(_ISAS) if level <= best and hasattr(lib, f"embed_{isa}"))


def choose_isa(name: str | None = None) -> str:
    """`name`, else COCKTAIL_ISA, else the widest; KernelError if this machine cannot run it."""
    have = available_isas()
    name = name or os.environ.get("COCKTAIL_ISA") or have[-1]
    if name not in have:
        raise KernelError(f"instruction set {name!r} is not available here; choose one of {', '.join(have)}")
    return name


def operation(name: str, isa: str) -> Callable[..., Any]:
    """The compiled function of one operation, e.g. operation("embed", "avx2"); KernelError where the build lacks it."""
    found: Callable[..., Any] | None = getattr(lib, f"{name}_{isa}", None)
    if found is None:
        raise KernelError(f"the C kernels were built from older sources: they have no {name}_{isa}; build them again: "
                          "python -m kernels_c.build --force, or pip install .")
    return found
