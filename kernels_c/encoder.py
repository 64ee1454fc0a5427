"""CpuEncoder: runtime.encoder.EncoderBackend in C. Each method checks shapes and dtypes and calls one function."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_c.arrays import F32, I32, Buffer, Matrix, allocate, check, matrix_record, pointer
from kernels_c.errors import KernelError
from kernels_c.isa import choose_isa, lib, operation
from kernels_c.threads import set_threads

Norm = Any  # runtime.encoder.Norm
Tensor = Any  # runtime.checkpoint.Tensor


class CpuEncoder:
    """The C kernels of one instruction set (kernels_c.backend.CpuBackend).

    threads: of the process-wide pool; None leaves it as it is, or, where nothing has set it, at as many as help.
    """

    tile = 512

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        self.architecture = isa = choose_isa(isa)
        if threads is not None or not lib.pool_threads():
            set_threads(isa, threads)
        self._embed, self._attention, self._add, self._gelu, self._pool = (
            operation(f"encoder_{name}", isa) for name in ("embed", "attention", "add", "gelu", "pool"))

    def beside(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def check_model(self, heads: int, head_dim: int) -> None:
        """Any shape will do."""

    # memory ----------------------------------------------------------------------------------------------------
    def matrix(self, *parts: Tensor) -> tuple[Matrix, ...]:
        """Keeps the views: memory-mapped matrices stay in the file."""
        return tuple(Matrix(part.data, part.dtype) for part in parts)

    def vector(self, data: npt.NDArray[np.float32]) -> Buffer:
        return self.upload(np.asarray(data, np.float32))

    def upload(self, data: npt.NDArray[Any]) -> Buffer:
        buffer = allocate(data.shape, data.dtype)
        buffer[...] = data
        return buffer

    def download(self, array: Buffer) -> npt.NDArray[np.float32]:
        return np.array(array, subok=False)

    def rows(self, T: int, width: int) -> Buffer:
        return allocate((T, width), F32)

    # operations ------------------------------------------------------------------------------------------------
    def embed(self, ids: Buffer, positions: Buffer, words: tuple[Matrix, ...], places: Buffer, norm: Norm,
              x: Buffer) -> None:  # fmt: skip
        (T, E), P = x.shape, len(places)
        status = self._embed(
            pointer("ids", ids, (T,), I32),
            pointer("positions", positions, (T,), I32),
            matrix_record("words", words[0], None, E),
            pointer("places", places, (P, E), F32),
            P,
            *_norm(norm, E),
            pointer("x", x, (T, E), F32),
            T,
        )
        check(status, "encoder_embed")

    def attention(self, x: Buffer, weight: tuple[Matrix, ...], bias: Buffer, starts: Buffer, longest: int, heads: int,
                  out: Buffer) -> None:  # fmt: skip
        (T, E), B = x.shape, len(starts) - 1
        if len(weight) != 3 or E % heads:
            raise KernelError(f"encoder_attention: expected weights of q, k and v and heads that divide {E}, but got "
                              f"{len(weight)} and {heads}")  # fmt: skip
        status = self._attention(
            pointer("x", x, (T, E), F32),
            *(matrix_record(name, part, E, E) for name, part in zip("qkv", weight, strict=True)),
            pointer("bias", bias, (3 * E,), F32),
            pointer("starts", starts, (B + 1,), I32),
            B,
            heads,
            pointer("out", out, (T, E), F32),
            T,
        )
        check(status, "encoder_attention")

    def add(self, h: Buffer, weight: tuple[Matrix, ...], bias: Buffer, norm: Norm, x: Buffer) -> None:
        (T, K), E = h.shape, x.shape[1]
        status = self._add(
            pointer("h", h, (T, K), F32),
            matrix_record("weight", weight[0], E, K),
            pointer("bias", bias, (E,), F32),
            *_norm(norm, E),
            pointer("x", x, (T, E), F32),
            T,
        )
        check(status, "encoder_add")

    def gelu(self, x: Buffer, weight: tuple[Matrix, ...], bias: Buffer, out: Buffer) -> None:
        (T, E), I = x.shape, out.shape[1]  # noqa: E741 - the project's letter of the MLP size
        status = self._gelu(
            pointer("x", x, (T, E), F32),
            matrix_record("weight", weight[0], I, E),
            pointer("bias", bias, (I,), F32),
            pointer("out", out, (T, I), F32),
            T,
        )
        check(status, "encoder_gelu")

    def pool(self, x: Buffer, starts: Buffer, pooling: str) -> Buffer:
        (T, E), B = x.shape, len(starts) - 1
        out = allocate((B, E), F32)
        status = self._pool(
            pointer("x", x, (T, E), F32),
            pointer("starts", starts, (B + 1,), I32),
            B,
            E,
            T,
            pooling == "mean",
            pointer("out", out, (B, E), F32),
        )
        check(status, "encoder_pool")
        return out


def _norm(norm: Norm, E: int) -> tuple[Any, Any, float]:
    return pointer("norm", norm.weight, (E,), F32), pointer("norm bias", norm.bias, (E,), F32), norm.eps
