"""Buffers and weight matrices that know their C pointer, and the check every wrapper makes before it passes one on.

A decode step makes about 150 calls, so a pointer is looked up once per array object and kept with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_c.errors import KernelError
from kernels_c.isa import ffi, lib

NULL = ffi.NULL
F32, F16, I32, U8 = (np.dtype(name) for name in ("float32", "float16", "int32", "uint8"))


class Buffer(np.ndarray[Any, Any]):
    """An ndarray that remembers its pointer. A slice is a Buffer of its own and looks its pointer up again."""

    _known: tuple[tuple[int, ...], np.dtype[Any], Any]
    turns: tuple[Any, int, int, Buffer]  # made of a table of cosines and of sines, chunk and first position (cache_ops)


def allocate(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
    """An uninitialized, C-contiguous, 64-byte aligned Buffer; MemoryError if the system refuses."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + 64, U8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + nbytes].view(dtype).reshape(shape).view(Buffer)


def pointer(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """The array's address as `void *`, after checking that it is C-contiguous and of this shape and dtype."""
    try:
        known = array._known
    except AttributeError:
        known = _inspect(name, array)
    if known[0] != shape or known[1] != dtype:
        raise KernelError(f"{name} must be {dtype.name} of shape {shape}, but is {known[1].name} of shape {known[0]}")
    return known[2]


def vector_pointer(name: str, array: Any, size: int) -> Any:
    """Like pointer for a float32 vector that may be None (then NULL)."""
    return NULL if array is None else pointer(name, array, (size,), F32)


class Matrix:
    """A weight matrix (rows = outputs, cols = inputs) as the kernels read it; keeps the view it was made of."""

    __slots__ = ("data", "dtype", "record", "shape")

    def __init__(self, data: npt.NDArray[Any], dtype: str) -> None:
        stored = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
        if dtype not in stored:
            raise KernelError(f"a weight matrix must be F32, F16 or BF16, but is {dtype}")
        if data.ndim != 2 or data.dtype != stored[dtype] or not data.flags.c_contiguous:
            raise KernelError(
                f"a {dtype} matrix needs a C-contiguous {np.dtype(stored[dtype]).name} array (rows, cols), but got "
                f"{data.dtype.name} {data.shape} with strides {data.strides}"
            )
        self.data, self.dtype, self.shape = data, dtype, data.shape
        address = ffi.cast("void *", data.__array_interface__["data"][0])
        self.record = ffi.new("matrix *", (address, *data.shape, getattr(lib, dtype)))


def matrix_record(name: str, weight: Matrix, rows: int | None, cols: int) -> Any:
    """The `const matrix *` of a weight after checking its shape; rows None accepts any."""
    if weight.shape[1] != cols or (rows is not None and weight.shape[0] != rows):
        raise KernelError(f"{name} must be ({'any' if rows is None else rows}, {cols}), but is {weight.shape}")
    return weight.record


def check(status: int, operation: str) -> None:
    """Raise what a kernel's status says."""
    if status == lib.NO_MEMORY:
        raise MemoryError(f"{operation}: no memory for scratch; use a smaller prefill tile")
    if status == lib.BAD_INDEX:
        raise KernelError(f"{operation}: an id, position or slot lies outside its table")
    if status == lib.NOT_FINITE:
        raise KernelError(f"{operation}: every logit is NaN or -infinity; the weights or the cache are damaged")


def _inspect(name: str, array: Any) -> tuple[tuple[int, ...], np.dtype[Any], Any]:
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
        kind = f"strides {array.strides}" if isinstance(array, np.ndarray) else type(array).__name__
        raise KernelError(f"{name} must be a C-contiguous array, but has {kind}")
    known = (array.shape, array.dtype, ffi.cast("void *", array.__array_interface__["data"][0]))
    if isinstance(array, Buffer):
        array._known = known
    return known
