"""How one layer's decode attention is divided among the GPU's blocks: equal shares of its bytes, decided once.

The chunks of all KV heads, those with quantized V first, form one sequence that is cut into as many parts as blocks
run at once. The tail, whose length grows, has blocks of its own. Nothing here depends on what else the GPU does, so
neither do results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_cu.layout import chunk_bytes

SEGMENT = np.dtype([(name, np.uint64) for name in ("k_codes", "k_meta", "v_codes", "v_meta", "positions")]
                   + [(name, np.int32) for name in ("format", "head", "n", "part", "parts", "result", "next", "pad")])
TAIL = 0  # as a segment's format; others are 100 * K bits + V bits
FP16 = 1616
MIN_PART = 24 * 1024  # bytes; shorter parts cost more to begin and to merge than they save


Span = Any  # runtime.backend.Span
Tail = Any  # runtime.backend.Tail


@dataclass(frozen=True)
class Work:
    """segments: SEGMENT (n,), block b begins with segment b and goes on with its `next`; results: int32 (G, 3), first,
    rotated and number of each KV head's partial results; n_results: of all."""

    segments: npt.NDArray[Any]
    blocks: int
    results: npt.NDArray[np.int32]
    n_results: int


def divide(base: int, spans: Sequence[Span], tail: Tail, kv_heads: int, head_dim: int, chunk: int, blocks: int) -> Work:
    """The work of a layer whose arena begins at address `base`, for a GPU that runs `blocks` blocks at once.

    Layers of one shape differ only in where they lie, so they are divided once, as if they began at 0.
    """
    start = min([tail.k, *(span.k_codes for span in spans)])
    placed = tuple(replace(span, **{name: getattr(span, name) - start for name in _PLACES}) for span in spans)
    tail_placed = replace(tail, k=tail.k - start, v=tail.v - start, positions=0)
    work = _divide(placed, tail_placed, kv_heads, head_dim, chunk, blocks)
    segments = work.segments.copy()
    for name in _PLACES:
        segments[name] += np.uint64(base + start)
    segments["positions"][segments["format"] == TAIL] = base + tail.positions  # the one array of all layers
    return replace(work, segments=segments)


_PLACES = ("k_codes", "k_meta", "v_codes", "v_meta", "positions")  # byte offsets of a Span, addresses of a segment


@lru_cache(maxsize=64)
def _divide(spans: Sequence[Span], tail: Tail, kv_heads: int, head_dim: int, chunk: int, blocks: int) -> Work:
    """With offsets for addresses; shared by those who ask, so not to be changed."""
    spans = sorted((span for span in spans if span.n), key=lambda span: span.v_bits == 16)
    sizes = [(*chunk_bytes(True, span.k_bits, chunk, head_dim), *chunk_bytes(False, span.v_bits, chunk, head_dim))
             for span in spans]  # fmt: skip
    costs = [sum(size) for size in sizes]
    total = kv_heads * sum(span.n * cost for span, cost in zip(spans, costs, strict=True))
    row = 2 * head_dim * tail.capacity  # bytes of the tail's K or V
    share = 2 * kv_heads * row / (total + 2 * kv_heads * row)
    tail_blocks = min(max(1, round(share * blocks / kv_heads)), -(-tail.capacity // 64))
    parts = max(1, min(max(blocks - kv_heads * tail_blocks, blocks // 4), total // MIN_PART))

    segments = []  # block, then SEGMENT without its result
    for head in range(kv_heads):
        for part in range(tail_blocks):
            segments.append((head * tail_blocks + part, tail.k + head * row, 0, tail.v + head * row, 0,
                             tail.positions, TAIL, head, tail.capacity, part, tail_blocks))  # fmt: skip
    done = 0
    for head in range(kv_heads):
        for span, (k_codes, k_meta, v_codes, v_meta), cost in zip(spans, sizes, costs, strict=True):
            part_of = (done + (2 * np.arange(span.n, dtype=np.int64) + 1) * cost // 2) * parts // total
            done += span.n * cost
            for part, c, n in zip(*np.unique(part_of, return_index=True, return_counts=True), strict=True):
                segments.append((kv_heads * tail_blocks + int(part),
                                 span.k_codes + head * span.k_codes_stride + int(c) * k_codes,
                                 span.k_meta + head * span.k_meta_stride + int(c) * k_meta,
                                 span.v_codes + head * span.v_codes_stride + int(c) * v_codes,
                                 span.v_meta + head * span.v_meta_stride + int(c) * v_meta,
                                 span.positions + 4 * int(c), 100 * span.k_bits + span.v_bits, head, int(n), 0,
                                 1))  # fmt: skip

    block_of = np.array([segment[0] for segment in segments], np.int32)
    table = np.array([(*segment[1:], -1, -1, 0) for segment in segments], SEGMENT)
    results, n_results = _place_results(table, block_of, kv_heads)
    return Work(_chain(table, block_of), len(np.unique(block_of)), results, n_results)


def _chain(table: npt.NDArray[Any], block_of: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """The segments with each block's first one at the block's index, and `next` for the others."""
    begins = np.append(True, block_of[1:] != block_of[:-1])
    place = np.where(begins, np.cumsum(begins) - 1, begins.sum() + np.cumsum(~begins) - 1)
    table["next"][:-1] = np.where(begins[1:], -1, place[1:])
    chained = np.empty_like(table)
    chained[place] = table
    return chained


def _place_results(table: npt.NDArray[Any], block_of: npt.NDArray[np.int32], kv_heads: int) -> tuple[Any, int]:
    """Give a result to each last segment of a block, a KV head and a rotation; each head's are neighbours."""
    rotated = (table["format"] != TAIL) & (table["format"] % 100 < 16)
    kind = np.stack([block_of, table["head"], rotated])
    last = np.append((kind[:, 1:] != kind[:, :-1]).any(axis=0), True)
    results, placed = np.zeros((kv_heads, 3), np.int32), 0
    for head in range(kv_heads):
        mine = np.flatnonzero(last & (table["head"] == head))
        mine = mine[np.argsort(~rotated[mine], kind="stable")]
        table["result"][mine] = placed + np.arange(len(mine))
        results[head] = placed, rotated[mine].sum(), len(mine)
        placed += len(mine)
    return results, placed
