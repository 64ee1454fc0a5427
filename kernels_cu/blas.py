"""Matrix products by cuBLAS, which may be captured into a CUDA graph.

CuPy's own bindings refuse every call while a stream is captured, so the product itself goes to the library that they
have loaded. What is captured keeps the address of cuBLAS's workspace: here one that is given to it and stays.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kernels_cu.arrays import STORED, Array, Matrix, allocate
from kernels_cu.build import import_cupy
from kernels_cu.errors import KernelError, ToolkitMissing

_CUDA_R = {"F32": 0, "F16": 2, "BF16": 14}
_OP_N, _OP_T, _COMPUTE_32F, _DEFAULT_ALGORITHM = 0, 1, 68, -1
_WORKSPACE = 32 * 2**20  # what cuBLAS takes by itself on Hopper


class Blas:
    """A cuBLAS handle on the current GPU. Work on two streams at a time needs two."""

    def __init__(self) -> None:
        handle = int(_bindings().create())
        # Not when the interpreter ends: the driver may be gone by then.
        weakref.finalize(self, _bindings().destroy, handle).atexit = False
        self._handle, self._library = ctypes.c_void_p(handle), _library()
        self._workspace: Array | None = None
        self._stream = -1

    def gemm(self, weight: Matrix, row: int, N: int, x: np.uint64, T: int, out: np.uint64, stride: int,
             add: bool = False, out_dtype: str = "F32") -> None:  # fmt: skip
        """out (T, N), rows `stride` values apart, = or += x (T, K) @ weight[row : row + N].T, sums in float32."""
        self._follow(int(import_cupy().cuda.get_current_stream().ptr))
        K, kind = weight.shape[1], _CUDA_R[weight.dtype]
        first = int(weight.address) + row * K * STORED[weight.dtype].itemsize
        alpha, beta = ctypes.c_float(1), ctypes.c_float(1 if add else 0)  # read before the call returns
        # cuBLAS counts by columns: its (N, T) is our (T, N).
        self._call("cublasGemmEx", _OP_T, _OP_N, N, T, K, ctypes.byref(alpha), ctypes.c_void_p(first), kind, K,
                   ctypes.c_void_p(int(x)), kind, K, ctypes.byref(beta), ctypes.c_void_p(int(out)),
                   _CUDA_R[out_dtype], stride, _COMPUTE_32F, _DEFAULT_ALGORITHM)  # fmt: skip

    def _follow(self, stream: int) -> None:
        """cuBLAS forgets its workspace with every new stream."""
        if stream == self._stream:
            return
        if self._workspace is None:
            self._workspace = allocate((_WORKSPACE,), np.uint8, "cuBLAS's workspace", "leave more to it")
        self._call("cublasSetStream_v2", ctypes.c_void_p(stream))
        self._call("cublasSetWorkspace_v2", ctypes.c_void_p(self._workspace.data.ptr), ctypes.c_size_t(_WORKSPACE))
        self._stream = stream

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(self._handle, *arguments):
            raise KernelError(f"{name} failed: status {status}")


@cache
def _bindings() -> Any:
    """CuPy's bindings of cuBLAS, or ToolkitMissing."""
    import_cupy()
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError as error:
        raise ToolkitMissing(f"cuBLAS cannot be loaded ({error}); run: pip install nvidia-cublas") from error
    return cublas


@cache
def _library() -> ctypes.CDLL:
    """The one that CuPy's bindings use; they have loaded it with their first handle."""
    with Path("/proc/self/maps").open() as maps:
        path = next((line.split(maxsplit=5)[-1].strip() for line in maps if "/libcublas.so" in line), None)
    if path is None:
        raise ToolkitMissing("cuBLAS is not loaded; run: pip install nvidia-cublas")
    return ctypes.CDLL(path)
