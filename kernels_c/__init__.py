"""The layer operations in C for the CPU, built with cffi: one source per operation, compiled per instruction set.

    python -m kernels_c.build     builds the extension in place (pip install does it too)
    kernels_c.CpuBackend()        the backend (runtime.backend.Backend); imports nothing of runtime
    COCKTAIL_ISA=scalar|avx2|avx512 overrides the instruction set, which is otherwise the widest this processor has
"""

from typing import Any

from kernels_c.errors import KernelError

__all__ = ["CpuBackend", "KernelError", "available_isas"]


def available_isas() -> tuple[str, ...]:
    """Instruction sets that are both built and supported by this processor, narrowest first."""
    from kernels_c.isa import available_isas

    return available_isas()


def __getattr__(name: str) -> Any:
    # Lazy, because `python -m kernels_c.build` imports this package before the extension exists.
    if name == "CpuBackend":
        from kernels_c.backend import CpuBackend

        return CpuBackend
    raise AttributeError(f"module 'kernels_c' has no attribute {name!r}")
