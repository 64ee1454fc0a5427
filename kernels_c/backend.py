"""CpuBackend: runtime.backend.Backend on the CPU. Each method checks shapes and dtypes and calls one C function."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_c.arrays import F32, I32, U8, Buffer, Matrix, allocate, check, pointer
from kernels_c.cache_ops import CacheOps
from kernels_c.errors import KernelError
from kernels_c.isa import choose_isa, lib, operation

_OPERATIONS = ("embed",)


class CpuBackend(CacheOps):
    """The C kernels of one instruction set.

    isa: "scalar", "avx2" or "avx512"; None takes COCKTAIL_ISA, else the widest this processor has.
    threads: of the process-wide pool; None chooses (default_threads). Results never depend on it.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        if threads is not None and threads < 1:
            raise KernelError(f"threads must be at least 1, but is {threads}")
        self.isa = choose_isa(isa)
        self.threads = threads or 1
        lib.pool_set_threads(self.threads)
        for name in _OPERATIONS:
            setattr(self, f"_{name}", operation(name, self.isa))
        super().__init__()

    def kernels(self) -> dict[str, str]:
        return {name: f"{name}_{self.isa}" for name in _OPERATIONS} | super().kernels()

    # memory ----------------------------------------------------------------------------------------------------
    def matrix(self, data: npt.NDArray[Any], dtype: str) -> Matrix:
        """Keeps the view: a memory-mapped matrix stays in the file, at any alignment."""
        return Matrix(data, dtype)

    def vector(self, data: npt.NDArray[Any], dtype: str) -> Buffer:
        return self.upload(np.asarray(data, np.float32))

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        return allocate(shape, dtype)

    def upload(self, data: npt.NDArray[Any]) -> Buffer:
        buffer = allocate(data.shape, data.dtype)
        buffer[...] = data
        return buffer

    def download(self, array: Buffer) -> npt.NDArray[Any]:
        """A copy, as on every backend: later steps overwrite the buffer."""
        return np.array(array, subok=False)

    def arena(self, nbytes: int) -> Buffer:
        return allocate((nbytes,), U8)

    # layer operations ------------------------------------------------------------------------------------------
    def embed(self, ids: Buffer, table: Matrix, out: Buffer) -> None:
        T, E = len(ids), table.shape[1]
        args = pointer("ids", ids, (T,), I32), table.record, pointer("out", out, (T, E), F32), T
        check(self._embed(*args), "embed")
