"""Maps for Hopper's tensor copies, which the driver encodes (CUtensorMap of the CUDA driver API)."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from kernels_cu.build import driver
from kernels_cu.errors import KernelError

_BYTES, _ALIGNMENT = 128, 64
_FLOAT16, _NO_INTERLEAVE, _SWIZZLE_128B, _L2_256B, _ZEROS = 6, 0, 3, 3, 0  # of the driver's enumerations


@lru_cache(maxsize=1024)
def rows_map(address: int, heads: int, rows: int, stride: int, D: int, box_rows: int) -> npt.NDArray[np.void]:
    """A map of the first `rows` rows of every head of a FP16 array (heads, stride, D), in boxes of box_rows x 64.

    A box arrives as rows of 128 bytes, swizzled as warpgroup products want them, and as zeros beyond `rows`. Kernels
    take the map by value (hopper.cuh: TensorMap).
    """
    room = np.zeros(_BYTES + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    encoded = room[start : start + _BYTES]
    sizes = (ctypes.c_uint64 * 3)(D, rows, heads)
    strides = (ctypes.c_uint64 * 2)(2 * D, 2 * D * stride)
    box, steps = (ctypes.c_uint32 * 3)(64, box_rows, 1), (ctypes.c_uint32 * 3)(1, 1, 1)
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(encoded.ctypes.data), _FLOAT16, 3, ctypes.c_void_p(address), sizes, strides, box, steps,
        _NO_INTERLEAVE, _SWIZZLE_128B, _L2_256B, _ZEROS)  # fmt: skip
    if status:
        raise KernelError(f"the driver refused a tensor map of ({heads}, {rows} of {stride}, {D}) in boxes of "
                          f"{box_rows} x 64 (CUresult {status})")  # fmt: skip
    return encoded.view(f"V{_BYTES}")  # of size one: what CuPy passes by value
