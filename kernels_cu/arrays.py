"""Weight matrices on the GPU, and the check that every wrapper makes before it passes an address to a kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_cu.build import import_cupy
from kernels_cu.errors import DeviceMemoryError, KernelError

Array = Any  # cupy.ndarray
F16, F32, F64, I32, U8 = (np.dtype(name) for name in ("float16", "float32", "float64", "int32", "uint8"))
NULL = np.uint64(0)
STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype("uint16")}


def allocate(shape: tuple[int, ...], dtype: npt.DTypeLike, purpose: str, hint: str) -> Array:
    """An uninitialized array; DeviceMemoryError with what was needed, what is free and a hint what to change."""
    cupy = import_cupy()
    try:
        return cupy.empty(shape, dtype)
    except cupy.cuda.memory.OutOfMemoryError as error:
        needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        raise DeviceMemoryError(
            f"{purpose} needs {needed / 2**20:,.0f} MiB on the GPU, but {free_bytes() / 2**20:,.0f} MiB are free; "
            f"{hint}"
        ) from error


def upload_bytes(table: npt.NDArray[Any], purpose: str, hint: str) -> Array:
    """A kernel's table, of whatever dtype, as uint8; purpose and hint: as allocate's."""
    array = allocate((table.nbytes,), U8, purpose, hint)
    array.set(np.ascontiguousarray(table).reshape(-1).view(U8))
    return array


def free_bytes() -> int:
    """Bytes that can still be allocated: what the driver has free, and what CuPy's pool holds unused, within the limit
    that the user may have set for it."""
    cupy = import_cupy()
    pool = cupy.get_default_memory_pool()
    free = int(cupy.cuda.runtime.memGetInfo()[0]) + int(pool.free_bytes())
    limit = int(pool.get_limit())  # 0: none
    return min(free, limit - int(pool.used_bytes())) if limit else free


def address(name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.uint64:
    """The array's device address, after checking that it is C-contiguous, 4-byte aligned, of this shape and dtype."""
    if not isinstance(array, import_cupy().ndarray):
        raise KernelError(f"{name} must be an array on the GPU, but is {type(array).__name__}")
    if array.shape != shape or array.dtype != dtype:
        found = f"{array.dtype.name} of shape {array.shape}"
        raise KernelError(f"{name} must be {dtype.name} of shape {shape}, but is {found}")
    if not array.flags.c_contiguous:
        raise KernelError(f"{name} must be C-contiguous, but has strides {array.strides}")
    return np.uint64(array.data.ptr)


def wide_address(name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.uint64:
    """Like address, for what kernels read 16 bytes at a time."""
    at = address(name, array, shape, dtype)
    if int(at) % 16:
        raise KernelError(f"{name} must begin at a multiple of 16 bytes, but begins at {int(at):#x}")
    return at


def vector_address(name: str, array: Array | None, size: int) -> np.uint64:
    """Like address for a float32 vector that may be None (then NULL)."""
    return NULL if array is None else address(name, array, (size,), F32)


class Matrix:
    """A weight matrix (rows = outputs, cols = inputs) in device memory, as stored: BF16 as uint16."""

    __slots__ = ("address", "array", "dtype", "shape")

    def __init__(self, data: npt.NDArray[Any], dtype: str) -> None:
        _check_stored(data, dtype)
        array = allocate(data.shape, STORED[dtype], "a weight matrix", "use a smaller model or --backend cpu")
        array.set(np.ascontiguousarray(data))
        self._keep(array, dtype)

    @classmethod
    def on_device(cls, array: Array, dtype: str) -> Matrix:
        """A matrix that is in device memory already; kept, not copied. Waits for what is still writing it: kernels
        read weights before the kernels ahead of them have ended (build.py)."""
        _check_stored(array, dtype)
        import_cupy().cuda.get_current_stream().synchronize()
        matrix = cls.__new__(cls)
        matrix._keep(array, dtype)
        return matrix

    def _keep(self, array: Array, dtype: str) -> None:
        self.address = wide_address("a weight matrix", array, array.shape, STORED[dtype])
        self.array, self.dtype, self.shape = array, dtype, array.shape


def _check_stored(data: Array, dtype: str) -> None:
    if dtype not in STORED:
        raise KernelError(f"a weight matrix must be F32, F16 or BF16, but is {dtype}")
    stored = STORED[dtype]
    if data.ndim != 2 or data.dtype != stored:
        raise KernelError(
            f"a {dtype} matrix needs a {stored.name} array (rows, cols), but got {data.dtype.name} {data.shape}"
        )
    if data.shape[1] * stored.itemsize % 16:
        raise KernelError(
            f"a {dtype} matrix on the GPU needs a multiple of {16 // stored.itemsize} inputs, but has "
            f"{data.shape[1]}; use --backend cpu"
        )


def same_dtype(**weights: Matrix) -> str:
    """The dtype that these matrices share; one kernel reads them all."""
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) > 1:
        named = ", ".join(f"{name} {weight.dtype}" for name, weight in weights.items())
        raise KernelError(f"these matrices must have one dtype on the GPU, but are {named}; convert the checkpoint")
    return dtypes.pop()


def check_matrix(name: str, weight: Matrix, rows: int | None, cols: int) -> None:
    """KernelError unless the matrix is (rows, cols); rows None accepts any."""
    if weight.shape[1] != cols or (rows is not None and weight.shape[0] != rows):
        raise KernelError(f"{name} must be ({'any' if rows is None else rows}, {cols}), but is {weight.shape}")
