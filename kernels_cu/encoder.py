"""CudaEncoder: runtime.encoder.EncoderBackend on one NVIDIA GPU. Rows are FP16, sums float32, products cuBLAS's.

Everything runs on a stream of high priority with a cuBLAS handle of its own, so that it can share the GPU with a
prefill: two streams must not share a handle's workspace.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_cu.arrays import F16, F32, I32, Array, Matrix, address, allocate, check_matrix, wide_address
from kernels_cu.blas import Blas
from kernels_cu.build import Spec, architecture_of, current_device, import_cupy, kernel
from kernels_cu.errors import KernelError

Norm = Any  # runtime.encoder.Norm
Tensor = Any  # runtime.checkpoint.Tensor

HEAD_DIMS = (16, 32, 48, 64, 96, 128)
MAX_HIDDEN = 2048  # values that a warp of encoder_norm.cu holds
QUERIES = 64  # rows of one block of encoder_attention.cu
_NORM_ROWS = 8  # rows of one block of encoder_norm.cu
_HIGH_PRIORITY = -1


class CudaEncoder:
    """The kernels of an encoder on the current GPU; raises what is missing (kernels_cu.errors) when it is made."""

    tile = 8192

    def __init__(self) -> None:
        device = current_device()
        self.architecture = f"sm_{architecture_of(device)}"
        self._cupy = import_cupy()
        self._stream, self._blas = _lane(device)

    def beside(self) -> AbstractContextManager[Any]:
        stream: AbstractContextManager[Any] = self._stream
        return stream

    def check_model(self, heads: int, head_dim: int) -> None:
        """KernelError for attention of a shape that the kernels do not have."""
        if head_dim not in HEAD_DIMS or heads * head_dim > MAX_HIDDEN:
            raise KernelError(f"{heads} heads of {head_dim} channels: the kernels take {HEAD_DIMS} channels, "
                              f"{MAX_HIDDEN} at most in all heads; use device='cpu'")  # fmt: skip

    # memory ----------------------------------------------------------------------------------------------------
    def matrix(self, *parts: Tensor) -> Matrix:
        """FP16, one below the other."""
        rows = np.concatenate([_halves(part) for part in parts])
        if not np.isfinite(rows).all():
            names = ", ".join(part.name for part in parts)
            raise KernelError(f"{names}: a value is beyond FP16, in which the encoder multiplies; use device='cpu'")
        return Matrix(rows, "F16")

    def vector(self, data: npt.NDArray[np.float32]) -> Array:
        return self.upload(np.asarray(data, np.float32))

    def upload(self, data: npt.NDArray[Any]) -> Array:
        array = self._empty(data.shape, data.dtype)
        array.set(np.ascontiguousarray(data))
        return array

    def download(self, array: Array) -> npt.NDArray[np.float32]:
        host: npt.NDArray[np.float32] = self._cupy.asnumpy(array)
        return host

    def rows(self, T: int, width: int) -> Array:
        return self._empty((T, width), F16)

    # operations ------------------------------------------------------------------------------------------------
    def embed(self, ids: Array, positions: Array, words: Matrix, places: Array, norm: Norm, x: Array) -> None:
        (T, E), P = x.shape, len(places)
        check_matrix("words", words, None, E)
        kernel(norm_spec("encoder_embed", E))((-(-T // _NORM_ROWS),), (256,), (
            address("ids", ids, (T,), I32), address("positions", positions, (T,), I32), words.address,
            wide_address("places", places, (P, E), F32), *_norm(norm, E), np.int32(T), np.int32(E),
            wide_address("x", x, (T, E), F16)))  # fmt: skip

    def attention(self, x: Array, weight: Matrix, bias: Array, starts: Array, longest: int, heads: int,
                  out: Array) -> None:  # fmt: skip
        (T, E), B = x.shape, len(starts) - 1
        self.check_model(heads, E // heads)
        check_matrix("weight", weight, 3 * E, E)
        qkv = self._empty((T, 3 * E), F16)
        self._multiply(wide_address("x", x, (T, E), F16), weight, T, qkv)
        kernel(attention_spec(E // heads))((heads * -(-longest // QUERIES), B), (128,), (
            wide_address("qkv", qkv, (T, 3 * E), F16), wide_address("bias", bias, (3 * E,), F32),
            address("starts", starts, (B + 1,), I32), np.int32(heads),
            wide_address("out", out, (T, E), F16)))  # fmt: skip

    def add(self, h: Array, weight: Matrix, bias: Array, norm: Norm, x: Array) -> None:
        (T, K), E = h.shape, x.shape[1]
        check_matrix("weight", weight, E, K)
        sums = self._empty((T, E), F32)
        self._multiply(wide_address("h", h, (T, K), F16), weight, T, sums)
        kernel(norm_spec("encoder_add", E))((-(-T // _NORM_ROWS),), (256,), (
            wide_address("sums", sums, (T, E), F32), wide_address("bias", bias, (E,), F32), *_norm(norm, E),
            np.int32(T), np.int32(E), wide_address("x", x, (T, E), F16)))  # fmt: skip

    def gelu(self, x: Array, weight: Matrix, bias: Array, out: Array) -> None:
        (T, E), I = x.shape, out.shape[1]  # noqa: E741 - the project's letter of the MLP size
        check_matrix("weight", weight, I, E)
        self._multiply(wide_address("x", x, (T, E), F16), weight, T, out)
        kernel(GELU)((-(-T * I // 2048),), (256,), (
            wide_address("out", out, (T, I), F16), wide_address("bias", bias, (I,), F32), np.int32(T),
            np.int32(I)))  # fmt: skip

    def pool(self, x: Array, starts: Array, pooling: str) -> Array:
        (T, E), B = x.shape, len(starts) - 1
        out = self._empty((B, E), F32)
        kernel(POOL)((-(-E // 256), B), (256,), (
            wide_address("x", x, (T, E), F16), address("starts", starts, (B + 1,), I32),
            np.int32(pooling == "mean"), np.int32(E), address("out", out, (B, E), F32)))  # fmt: skip
        return out

    def _multiply(self, x: np.uint64, weight: Matrix, T: int, out: Array) -> None:
        N = weight.shape[0]
        self._blas.gemm(weight, 0, N, x, T, np.uint64(out.data.ptr), N, out_dtype="F16" if out.dtype == F16 else "F32")

    def _empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        return allocate(shape, dtype, "the encoder", "leave more to it")


GELU, POOL = Spec.of("encoder_gelu.cu", "encoder_gelu"), Spec.of("encoder_pool.cu", "encoder_pool")


def norm_spec(entry: str, E: int) -> Spec:
    if E > MAX_HIDDEN or E % 8:
        raise KernelError(f"an encoder's hidden size must be a multiple of 8 up to {MAX_HIDDEN}, but is {E}")
    return Spec.of("encoder_norm.cu", entry, HELD=-(-E // 128))


def attention_spec(D: int) -> Spec:
    return Spec.of("encoder_attention.cu", "encoder_attention", D=D)


def compile_cover() -> Iterator[Spec]:
    yield from (GELU, POOL, *(attention_spec(D) for D in HEAD_DIMS))
    for entry in ("encoder_embed", "encoder_add"):
        yield from (norm_spec(entry, E) for E in (384, 768, 1024, MAX_HIDDEN))


@cache
def _lane(device: int) -> tuple[Any, Blas]:
    """The stream and the cuBLAS handle of all encoders on a GPU."""
    return import_cupy().cuda.Stream(non_blocking=True, priority=_HIGH_PRIORITY), Blas()


def _halves(tensor: Tensor) -> npt.NDArray[np.float16]:
    data = tensor.data
    if tensor.dtype == "BF16":
        data = (data.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        halves: npt.NDArray[np.float16] = data.astype(np.float16)
    return halves


def _norm(norm: Norm, E: int) -> tuple[np.uint64, np.uint64, np.float32]:
    return (wide_address("norm", norm.weight, (E,), F32), wide_address("norm bias", norm.bias, (E,), F32),
            np.float32(norm.eps))  # fmt: skip
