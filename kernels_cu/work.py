"""How one layer's decode attention is divided among the GPU's blocks, decided once when a sequence is bound.

The chunks of each KV head, those with quantized V first, form one sequence of bytes that is cut into parts, one per
block; beginning a span of quantized chunks counts as bytes too, or a block that has several would end last. As many
blocks as the GPU runs at once get a large part each; what is left is cut into small ones, which the GPU hands to
whichever processor is free first: processors do not progress equally, and the slowest one sets the time. The tail,
whose length grows, has blocks of its own, and so has what it gives up while it grows (Layout.flush).

The cuts depend on the sequence and the kind of GPU alone: not on what else runs, nor on who shares a batch (`join`
only puts parts of several sequences into one list). A part has a partial result of its own and the merge adds them in
a fixed order, so a sequence's outputs have the same bits alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels_cu.layout import chunk_bytes

POINTERS = ("k_codes", "k_meta", "v_codes", "v_meta", "positions")
NUMBERS = ("format", "sequence", "head", "n", "part", "parts", "result", "next")
SEGMENT = np.dtype([(name, np.uint64) for name in POINTERS] + [(name, np.int32) for name in NUMBERS])
SEGMENT_SHARED = np.dtype([*SEGMENT.descr, ("v_shared", np.uint64)])  # of kvquant: what V stores once for all heads
TAIL = 0  # as a segment's format; others are 100 * K bits + V bits
MIN_PART = 48 * 1024  # bytes; shorter parts cost more to begin and to merge than they save
MIN_CODED = 24 * 1024  # the same for short contexts where anything is quantized: decoding takes longer than reading
BEGIN = 24 * 1024  # bytes that a block could read while it begins a span of quantized chunks
LARGE = 0.8  # of all bytes: what the parts that begin at once take
SMALL = 0.2  # of such a block's equal share: a small part
STAGGER = 0.2  # how much the large parts differ in size, so that blocks do not begin and end together

Span = Any  # runtime.backend.Span
Tail = Any  # runtime.backend.Tail
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Work:
    """segments: SEGMENT (n,), block b begins with segment b and goes on with its `next`; large: how many of the blocks
    are to begin first; results: int32 (heads, 3), first, rotated and number of each KV head's; n_results: of all.
    like: the same work without its pointers, which layers of one shape share."""

    segments: npt.NDArray[Any]
    blocks: int
    large: int
    results: npt.NDArray[np.int32]
    n_results: int
    like: Work | None = None


def divide(base: int, spans: Sequence[Span], tail: Tail, kv_heads: int, head_dim: int, chunk: int, blocks: int,
           family: str = "rotated", flushed: Span | None = None) -> Work:  # fmt: skip
    """The work of a layer whose arena begins at address `base`, for a GPU that runs `blocks` blocks at once."""
    spans = sorted((span for span in spans if span.n), key=lambda span: span.v_bits == 16)
    spans += [flushed] if flushed else []
    shape = tuple((span.n, span.k_bits, span.v_bits) for span in spans)
    work, source, first = _divide(shape, flushed is not None, tail.capacity, kv_heads, head_dim, chunk, blocks, family)
    row = 2 * head_dim * tail.capacity
    places = {"k_codes": [(span.k_codes, span.k_codes_stride) for span in spans] + [(tail.k, row)],
              "k_meta": [(span.k_meta, span.k_meta_stride) for span in spans] + [(0, 0)],
              "v_codes": [(span.v_codes, span.v_codes_stride) for span in spans] + [(tail.v, row)],
              "v_meta": [(span.v_meta, span.v_meta_stride) for span in spans] + [(0, 0)],
              "positions": [(span.positions, 0) for span in spans] + [(tail.positions, 0)]}  # fmt: skip
    sizes = np.array([[*chunk_bytes(True, k_bits, chunk, head_dim, family),
                       *chunk_bytes(False, v_bits, chunk, head_dim, family), 4]
                      for _, k_bits, v_bits in shape] + [[0] * 5])  # fmt: skip
    segments = work.segments.copy()
    for name, size in zip(POINTERS, sizes.T, strict=True):
        start, stride = np.array(places[name], np.int64).T
        segments[name] = base + start[source] + segments["head"] * stride[source] + first * size[source]
    if family == "kvquant":
        start = np.array([span.v_shared for span in spans] + [0], np.int64)
        segments["v_shared"] = base + start[source] + first * 4 * chunk
    return replace(work, segments=segments, like=work)


def join(works: Sequence[Work], sequences: Sequence[int] | None = None, n_results: int = 0) -> Work:
    """One list of what several sequences have to do, with the numbers of these sequences in a batch (0, 1, ..); KV head
    h of sequence b becomes head b * kv_heads + h. n_results: of other lists of the batch, whose results come first;
    they count in the list's own."""
    numbers = tuple(range(len(works)) if sequences is None else sequences)
    joined, order = _joined(tuple(work.like or work for work in works), numbers, n_results)
    segments = joined.segments.copy()
    for name in segments.dtype.names or ():
        if name not in NUMBERS:
            segments[name] = np.concatenate([work.segments[name] for work in works])[order]
    return replace(joined, segments=segments)


@lru_cache(maxsize=8)
def _joined(works: tuple[Work, ...], sequences: tuple[int, ...], n_results: int) -> tuple[Work, Ints]:
    """What layers of one shape share of `join`, and which of the works' segments, one behind the other, come where."""
    kv_heads = len(works[0].results)
    segments: list[npt.NDArray[Any]] = []
    results, order = [], []
    for b, work in zip(sequences, works, strict=True):
        part, first = work.segments.copy(), sum(len(others) for others in segments)
        part["sequence"] = b
        part["head"] += b * kv_heads
        part["result"] += np.where(part["result"] >= 0, n_results, 0).astype(np.int32)
        part["next"] += np.where(part["next"] >= 0, first, 0).astype(np.int32)
        segments.append(part)
        results.append(work.results + np.array([n_results, 0, 0], np.int32))
        order.append(np.where(np.arange(len(part)) < work.large, 0, np.where(np.arange(len(part)) < work.blocks, 1, 2)))
        n_results += work.n_results
    joined, new_to_old = np.concatenate(segments), np.argsort(np.concatenate(order), kind="stable")
    old_to_new = np.argsort(new_to_old).astype(np.int32)
    joined["next"] = np.where(joined["next"] >= 0, old_to_new[joined["next"]], -1)
    return Work(joined[new_to_old], sum(work.blocks for work in works), sum(work.large for work in works),
                np.concatenate(results), n_results), new_to_old  # fmt: skip


@lru_cache(maxsize=64)
def _divide(spans: tuple[tuple[int, int, int], ...], flushed: bool, capacity: int, kv_heads: int, head_dim: int,
            chunk: int, blocks: int, family: str) -> tuple[Work, Ints, Ints]:  # fmt: skip
    """What layers of one shape share. spans: chunks, K bits, V bits; flushed: the last one fills while the tail grows.
    The work without its pointers, and each segment's span (-1: the tail) and first chunk."""
    costs = [sum(chunk_bytes(True, k, chunk, head_dim, family)) + sum(chunk_bytes(False, v, chunk, head_dim, family))
             for _, k, v in spans]  # fmt: skip
    n_fixed = len(spans) - flushed
    even = all(k == v == 16 for _, k, v in spans)  # then all wait for memory alone, and small parts cost 1%
    begin = 0 if even else BEGIN
    total = sum(begin + n * cost for (n, _, _), cost in zip(spans[:n_fixed], costs, strict=False))  # of one KV head
    tail_bytes = 4 * head_dim * capacity
    tail_parts = min(max(1, round(tail_bytes / (total + tail_bytes) * blocks / kv_heads)), -(-capacity // 64))

    one_head: list[tuple[int, ...]] = [(part - tail_parts, -1, 0, TAIL, capacity, part, tail_parts)
                                       for part in range(tail_parts)]  # fmt: skip
    growing = tail_parts
    for (n, k_bits, v_bits), cost in zip(spans[n_fixed:], costs[n_fixed:], strict=True):  # shared as a tail is
        parts = min(max(1, round(n * cost / (total + n * cost) * blocks / kv_heads)), -(-n // 4))
        growing += parts
        one_head[:0] = [(part - growing, n_fixed, 0, 100 * k_bits + v_bits, n, part, -parts) for part in range(parts)]
    ends, large = _cuts(total, max(1, blocks // kv_heads - growing), even)
    done = 0
    for i, ((n, k_bits, v_bits), cost) in enumerate(zip(spans[:n_fixed], costs, strict=False)):
        done += begin
        part_of = np.searchsorted(ends, done + (2 * np.arange(n) + 1) * cost / 2)  # by the middles of the chunks
        done += n * cost
        for part, first, count in zip(*np.unique(part_of, return_index=True, return_counts=True), strict=True):
            one_head.append((part, i, first, 100 * k_bits + v_bits, count, 0, 1))
    columns = np.tile(np.array(one_head, np.int64).T, kv_heads)
    head = np.repeat(np.arange(kv_heads), len(one_head))
    order = np.argsort(columns[0] >= large, kind="stable")  # all large parts before the small ones
    columns, head = columns[:, order], head[order]
    table = np.zeros(len(order), SEGMENT_SHARED if family == "kvquant" else SEGMENT)
    for name, column in zip(("format", "n", "part", "parts"), columns[3:], strict=True):
        table[name] = column
    table["head"], table["result"], table["next"] = head, -1, -1

    which, source, first_chunk = columns[:3]
    begins = np.append(True, (which[1:] != which[:-1]) | (head[1:] != head[:-1]))
    results, n_results = _place_results(table, np.cumsum(begins), kv_heads)
    if family != "rotated":
        results[:, 1] = 0
    place = np.where(begins, np.cumsum(begins) - 1, begins.sum() + np.cumsum(~begins) - 1)  # first segments go first
    table["next"][:-1] = np.where(begins[1:], -1, place[1:])
    old = np.argsort(place)
    work = Work(table[old], int(begins.sum()), int((begins & (which < large)).sum()), results, n_results)
    return work, source[old], first_chunk[old]


def _cuts(total: int, at_once: int, even: bool) -> tuple[npt.NDArray[Any], int]:
    """Where each part but the last of one KV head's `total` bytes ends, and how many parts are large; even: all are."""
    if even or total < 2 * at_once * MIN_PART:  # one wave of equal parts
        n = max(1, min(at_once, total // (MIN_PART if even else MIN_CODED)))
        return np.arange(1, n) * (total / n), n
    share = total / at_once
    larges = LARGE * share * (1 + STAGGER * (np.arange(at_once) % 4 / 3 - 0.5))
    left = total - larges.sum()
    n = max(1, int(left // max(MIN_PART, SMALL * share)))
    return np.cumsum(np.concatenate([larges, np.full(n, left / n)]))[:-1], at_once


def _place_results(table: npt.NDArray[Any], block_of: Ints, kv_heads: int) -> tuple[npt.NDArray[np.int32], int]:
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
