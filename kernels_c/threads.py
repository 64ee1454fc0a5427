"""How many threads to use when the caller does not say: physical cores, as far as they measurably help.

On shared machines two threads can be slower than one, and one core often reads as fast as the memory delivers; so
a probe of a few hundredths of a second decides, separately for arithmetic and for streaming. Results do not depend
on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from kernels_c.arrays import F32, NULL, Matrix, pointer
from kernels_c.errors import KernelError
from kernels_c.isa import lib, operation
from kernels_c.machine import usable_cores

__all__ = ["set_threads"]

_GAIN = 1.25  # more threads must be faster by this factor: the core may be wanted elsewhere a moment later


def set_threads(isa: str, threads: int | None) -> tuple[int, int]:
    """Set the process-wide pool to so many threads, None: to as many as help; (for arithmetic, for streaming)."""
    if threads is not None and threads < 1:
        raise KernelError(f"threads must be at least 1, but is {threads}")
    chosen = (threads, threads) if threads else _measured(isa)
    lib.pool_set_threads(*chosen)
    if threads and lib.pool_threads() < threads:
        raise KernelError(f"threads must be at most {lib.pool_threads()}, but is {threads}")
    return chosen


def _measured(isa: str) -> tuple[int, int]:
    cores = usable_cores()
    if cores == 1:
        return 1, 1
    counts = sorted({min(2**i, cores) for i in range(cores.bit_length() + 1)})
    product = _probe(isa, rows=96, inputs=512, outputs=512, calls=4)
    stream = _probe(isa, rows=1, inputs=1024, outputs=1024, calls=24)  # 48 MiB: more than most processors cache
    return _fewest(counts, product), _fewest(counts, stream)


def _fewest(counts: list[int], run: Callable[[], None]) -> int:
    """The last count that still beat the best smaller one by _GAIN."""
    chosen, best = counts[0], _time(counts[0], run)
    for count in counts[1:]:
        took = _time(count, run)
        if took * _GAIN < best:
            chosen, best = count, took
    return chosen


def _time(threads: int, run: Callable[[], None]) -> float:
    """Median seconds of five runs after one that warms caches and starts workers."""
    lib.pool_set_threads(threads, threads)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:]))


def _probe(isa: str, rows: int, inputs: int, outputs: int, calls: int) -> Callable[[], None]:
    """A run of linear layers of a small model's size, so that the cost of meeting after each one is measured too."""
    weights = np.ones((calls, outputs, inputs), np.float16)  # not zeros: untouched pages would all be one and the same
    h, x = np.zeros((rows, inputs), np.float32), np.zeros((rows, outputs), np.float32)
    matrices, linear_add = [Matrix(weight, "F16") for weight in weights], operation("linear_add", isa)

    def run() -> None:
        for matrix in matrices:
            linear_add(pointer("h", h, h.shape, F32), matrix.record, NULL, pointer("x", x, x.shape, F32), rows)

    return run
