"""What is measured on any backend: the rate at which it reads memory, and whether its kernels are right."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from runtime.backend import Backend
from runtime.diagnosis import Finding
from runtime.diagnosis.probes import probe, probe_encoder
from runtime.encoder import EncoderBackend

ROWS, COLUMNS = 8192, 8192  # FP16: 128 MiB, more than caches hold
PASSES = 8


def read_rate(backend: Backend, free: int | None) -> float | None:
    """GB/s at which the product of one row with a matrix reads that matrix: what decoding is bound by. The best of a
    few, since others may use the machine. None where less than four times the matrix is free (bytes; None: unknown)."""
    nbytes = 2 * ROWS * COLUMNS
    if free is not None and free < 4 * nbytes:
        return None
    # Not zeros: untouched pages would all be one and the same.
    weight = backend.matrix(np.full((ROWS, COLUMNS), 0.5, np.float16), "F16")
    h, x = backend.empty((1, COLUMNS), np.float32), backend.empty((1, ROWS), np.float32)
    h[:], x[:] = 0, 0
    best = float("inf")
    for _ in range(PASSES + 1):  # the first call warms up
        backend.launched()()
        begin = time.perf_counter()
        backend.linear_add(h, weight, None, x)
        backend.launched()()
        best = min(best, time.perf_counter() - begin)
    return nbytes / best / 1e9


def probed(area: str, subject: str, backend: Backend, encoder: EncoderBackend | None = None) -> Iterator[Finding]:
    """One line for all kernels that are right, one more for each that is not, one for what the backend refuses."""
    begin = time.perf_counter()
    results = [*probe(backend), *(probe_encoder(encoder) if encoder is not None else ())]
    seconds = time.perf_counter() - begin
    refused = [result for result in results if result.refused]
    wrong = [result for result in results if not result.good and not result.refused]
    right = [result for result in results if result.good]
    if right:
        worst = max(right, key=lambda result: result.error)
        yield Finding(area, subject, "pass", f"{len(right)} probes agree with float64 arithmetic, {seconds:.1f} s; "
                      f"largest difference {worst.error:.1e}, {worst.operation}")
    for result in wrong:
        found = result.problem or f"differs by {result.error:.1e} of the largest value; expected {result.tolerance:g}"
        yield Finding(area, f"{subject}: {result.operation}", "fail", found,
                      "this build computes wrong answers here: report it with this output, and use another --backend "
                      "or COCKTAIL_ISA until then" if not result.problem else "see the message; then run this again")
    for result in refused:
        yield Finding(area, f"{subject}: {result.operation}", "warn", result.problem, "use --backend cpu for these")
