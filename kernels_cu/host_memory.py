"""Page-locked host memory in large blocks, which copies to and from the GPU at full speed.

The driver's own allocation touches one page after the other: with it a document's first question took 20 s longer for
16 GiB, on a virtual machine with 16 cores. Here several threads touch them, in large pages where the kernel has some,
and the driver locks what is there: 3 s.
"""

from __future__ import annotations

import mmap
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_cu.build import import_cupy

_PAGE, _PART = 4096, 64 * 2**20


class _Locked:
    """What an array of page-locked memory keeps alive."""

    def __init__(self, nbytes: int) -> None:
        runtime = import_cupy().cuda.runtime
        try:
            self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{nbytes:,} bytes of host memory: {error}") from error
        with suppress(OSError, AttributeError):  # a hint, which some kernels do not take
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        pages = np.frombuffer(self._memory, np.uint8)[::_PAGE]
        step = _PART // _PAGE
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            list(pool.map(lambda first: pages[first : first + step].fill(0), range(0, len(pages), step)))
        address = pages.ctypes.data
        try:
            runtime.hostRegister(address, nbytes, 0)
        except runtime.CUDARuntimeError as error:
            raise MemoryError(f"{nbytes:,} bytes of page-locked host memory: {error}") from error
        # Before the memory goes, and not when the interpreter ends: the driver may be gone by then.
        weakref.finalize(self, runtime.hostUnregister, address).atexit = False
        self.__array_interface__: dict[str, Any] = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1",
                                                    "version": 3}  # fmt: skip


def locked(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros. MemoryError where the host has no such memory."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return np.asarray(_Locked(max(nbytes, 1)))[:nbytes].view(dtype).reshape(shape)
