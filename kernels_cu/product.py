"""Products of many rows of activations with weight matrices, by cuBLAS: what an Operation is, and how it is done.

Activations are converted to the weights' type, sums are float32, and `finish` does what cuBLAS cannot (RoPE, SiLU).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kernels_cu.arrays import NULL, STORED, Array, Matrix, allocate
from kernels_cu.build import Spec, import_cupy, kernel
from kernels_cu.errors import ToolkitMissing

Defines = tuple[tuple[str, int | str], ...]

PAIR = {"STORE": 1, "ADD": 1, "GATE_UP": 2, "QKV": 2}  # rows of weights that an epilogue needs together
_CUDA_R = {"F32": 0, "F16": 2, "BF16": 14}
_COMPUTE_32F, _DEFAULT_ALGORITHM = 68, -1


@dataclass(frozen=True)
class Operation:
    """An epilogue of epilogue.cuh, its weights and arguments; D only for QKV."""

    epilogue: str
    weights: tuple[Matrix, ...]
    units: int
    arguments: tuple[Any, ...]
    D: int = 0

    @property
    def dtype(self) -> str:
        return self.weights[0].dtype

    @property
    def defines(self) -> Defines:
        head = (("D", self.D),) if self.D else ()
        return (("EPILOGUE", self.epilogue), ("WEIGHT", self.dtype), *head)


class Product:
    """Runs Operations by cuBLAS on one GPU; owns their scratch memory, which grows to the largest tile."""

    def __init__(self) -> None:
        self._scratch: dict[str, Array] = {}

    def converted(self, dtype: str, x: np.uint64, T: int, K: int, norm: np.uint64 | None, eps: float) -> np.uint64:
        """x in the weights' type, normed; x itself where there is nothing to do."""
        if dtype == "F32" and norm is None:
            return x
        out = self._room("activations", T * K * STORED[dtype].itemsize)
        convert = _convert(dtype, norm is not None)
        convert((T,), (256,), (x, NULL if norm is None else norm, np.float32(eps), np.int32(K), out))
        return out

    def run(self, operation: Operation, activations: np.uint64, T: int, K: int) -> None:
        """operation of activations (T, K) in the weights' type."""
        units, epilogue = operation.units, operation.epilogue
        finish = kernel(finish_spec(operation.defines))
        grid = (-(-units // 256), T)
        if PAIR[epilogue] == 1:
            _, bias, out, _ = operation.arguments
            if bias:
                finish(grid, (256,), (NULL, *operation.arguments))
            _gemm(operation.weights[0], activations, T, out, units, add=epilogue == "ADD" or bool(bias))
            return
        total = sum(weight.shape[0] for weight in operation.weights)
        sums = self._room("sums", 4 * T * total)
        column = 0
        for weight in operation.weights:
            _gemm(weight, activations, T, np.uint64(int(sums) + 4 * column), total)
            column += weight.shape[0]
        finish(grid, (256,), (sums, *operation.arguments))

    def _room(self, name: str, nbytes: int) -> np.uint64:
        held = self._scratch.get(name)
        if held is None or held.nbytes < nbytes:
            self._scratch.pop(name, None)
            held = allocate((nbytes,), np.uint8, f"prefill scratch ({name})", "use a smaller tile")
            self._scratch[name] = held
        return np.uint64(held.data.ptr)


@cache
def finish_spec(defines: Defines) -> Spec:
    return Spec.of("finish.cu", "finish", **dict(defines))


def convert_spec(dtype: str, norm: bool) -> Spec:
    return Spec.of("convert.cu", "convert", WEIGHT=dtype, NORM=int(norm))


@cache
def _convert(dtype: str, norm: bool) -> Any:
    return kernel(convert_spec(dtype, norm))


def _gemm(weight: Matrix, x: np.uint64, T: int, out: np.uint64, stride: int, add: bool = False) -> None:
    """out (T, N), rows `stride` floats apart, = or += x (T, K) @ weight.T, sums in float32."""
    cublas, handle = _cublas()
    cublas.setStream(handle, import_cupy().cuda.get_current_stream().ptr)
    N, K = weight.shape
    factors = np.array([1, 1 if add else 0], np.float32)  # alpha and beta, in host memory until the call returns
    at, kind = factors.ctypes.data, _CUDA_R[weight.dtype]
    # cuBLAS counts by columns: its (N, T) is our (T, N).
    cublas.gemmEx(handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, N, T, K, at, int(weight.address), kind, K,
                  int(x), kind, K, at + 4, int(out), _CUDA_R["F32"], stride, _COMPUTE_32F,
                  _DEFAULT_ALGORITHM)  # fmt: skip


def _cublas() -> tuple[Any, Any]:
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError as error:
        raise ToolkitMissing(f"cuBLAS cannot be loaded ({error}); run: pip install nvidia-cublas") from error
    return cublas, import_cupy().cuda.device.get_cublas_handle()
