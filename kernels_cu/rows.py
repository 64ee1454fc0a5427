"""What the sequences of a batch keep each for itself: gathered before a step, drawn from after it, a launch each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_cu.arrays import F32, F64, I32, Array, address, allocate, upload_bytes
from kernels_cu.build import kernel
from kernels_cu.cache_ops import STATE_SIZE
from kernels_cu.ends import GATHER, MAX_VOCABULARY, SAMPLE_ROWS
from kernels_cu.errors import KernelError

Draws = Any  # runtime.backend.Draws
_HINT = "let fewer sequences run at once"
_SOURCE = np.dtype([("state", np.uint64), ("cos", np.uint64), ("sin", np.uint64), ("positions", np.int64)])
_DRAW = np.dtype([(name, np.uint64) for name in ("options", "uniforms", "seen", "state", "ids", "fault")]
                 + [("N", np.int32), ("M", np.int32)])  # fmt: skip


class Rows:
    """runtime.backend.BatchRows. Addresses lie in tables on the GPU, so that a graph may replay the launches."""

    def __init__(self, states: Sequence[Array], ropes: Sequence[tuple[Array, Array]], draws: Sequence[Draws],
                 faults: tuple[Array, npt.NDArray[np.int32]], fault: np.uint64, meanings: Mapping[int, str]) -> None:
        """faults: a word for each sequence, here and on the GPU; fault: the one of all other kernels; meanings: of what
        is written there."""
        self._alive = states, ropes, draws, faults[0]
        self._fault, self._found, self._meanings, self._draws = fault, faults[1], meanings, draws
        self._found[:] = 0
        self._half = ropes[0][0].shape[1]
        sources, rows = np.zeros(len(states), _SOURCE), np.zeros(len(states), _DRAW)
        for b, (state, (cos, sin), draw) in enumerate(zip(states, ropes, draws, strict=True)):
            N, M = len(draw.uniforms), len(draw.seen)
            at = address("state", state, (STATE_SIZE,), I32)
            sources[b] = (at, *(address("a RoPE table", table, (len(cos), self._half), F32) for table in (cos, sin)),
                          len(cos))  # fmt: skip
            rows[b] = (address("options", draw.options, (5,), F64), address("uniforms", draw.uniforms, (N,), F64),
                       address("seen", draw.seen, (M,), I32), at, address("ids", draw.ids, (N,), I32),
                       faults[0].data.ptr + 4 * b, N, M)  # fmt: skip
        self._sources, self._rows = (upload_bytes(table, "a batch's table", _HINT) for table in (sources, rows))
        self._candidates: Array | None = None

    def gather(self, state: Array, token: Array, cos: Array, sin: Array) -> None:
        T = len(state)
        kernel(GATHER)((len(self._found),), (128,), (
            np.uint64(self._sources.data.ptr), np.int32(self._half), address("state", state, (T, STATE_SIZE), I32),
            address("token", token, (T,), I32), address("cos", cos, (T, self._half), F32),
            address("sin", sin, (T, self._half), F32), self._fault))  # fmt: skip

    def sample(self, logits: Array) -> None:
        """As CudaBackend.sample, a block for each sequence."""
        (T, V), B = logits.shape, len(self._found)
        if self._candidates is None:
            for draw in self._draws:
                check_draws(V, draw)
            self._candidates = allocate((2, B, V), I32, "drawing ids", _HINT)
        keys, left = self._candidates
        kernel(SAMPLE_ROWS)((B,), (1024,), (
            address("logits", logits, (T, V), F32), np.int32(V), np.uint64(self._rows.data.ptr),
            np.uint64(keys.data.ptr), np.uint64(left.data.ptr)))  # fmt: skip

    def errors(self) -> list[Exception | None]:
        found = [KernelError(self._meanings[int(fault)]) if fault else None for fault in self._found]
        self._found[:] = 0
        return found


def check_draws(vocabulary: int, draws: Draws) -> None:
    """KernelError for what `sample` cannot draw from so many logits."""
    N, M = len(draws.uniforms), len(draws.seen)
    if vocabulary > MAX_VOCABULARY:
        raise KernelError(f"sample: at most {MAX_VOCABULARY:,} logits, but got {vocabulary:,}; use --backend cpu")
    if N > M:
        raise KernelError(f"sample: {N} uniform numbers need room for as many ids among those seen, but it is {M}")
