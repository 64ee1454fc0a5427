"""Attention mass: how much of some query rows' attention falls on each chunk, in two passes over K."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kernels_cu.arrays import F32, allocate
from kernels_cu.attention import HEAD_DIMS, UNLIMITED
from kernels_cu.build import Spec, kernel

_THREADS, _KEYS = 128, 64  # of a block; keys that it takes in one step
_COLUMNS = (32, 64)  # rows (query token, head) of a step; more rows take several, and K comes from L2 again


def attention_mass(q: np.uint64, k: np.uint64, out: np.uint64, T: int, H: int, G: int, S: int, D: int, start: int,
                   window: int | None, first: int, chunk: int, N: int, processors: int) -> None:  # fmt: skip
    """Addresses and sizes as in runtime.backend.Backend.attention_mass, all checked."""
    rows, reach = T * (H // G), min(window or UNLIMITED, UNLIMITED)
    columns = _COLUMNS[0] if rows <= _COLUMNS[0] else _COLUMNS[1]
    rows_pass, chunks_pass = _specs(D, columns)
    at_once = -(-processors * _blocks(D) // G)  # blocks per KV head that fill the GPU once
    visible = start + T - max(0, start - reach + 1)
    span = -(-visible // (at_once * _KEYS)) * _KEYS
    splits = -(-visible // span)
    padded = -(-rows // columns) * columns
    softmax = allocate((2 * G * splits * padded,), F32, "attention mass", "ask with fewer tokens")
    sums = np.uint64(softmax.data.ptr)
    sizes = [np.int32(size) for size in (T, H, G, S, start, reach)]
    kernel(rows_pass)((splits, G), (_THREADS,), (q, k, sums, *sizes, np.int32(span)))
    share = max(_THREADS // 32, -(-N // at_once))
    chunks = [np.int32(size) for size in (splits, first, chunk, N, share)]
    kernel(chunks_pass)((-(-N // share), G), (_THREADS,), (q, k, sums, out, *sizes, *chunks))


def compile_cover() -> Iterator[Spec]:
    for D in HEAD_DIMS:
        for columns in _COLUMNS:
            yield from _specs(D, columns)


def _specs(D: int, columns: int) -> tuple[Spec, Spec]:
    rows, chunks = (Spec.of("attention_mass.cu", entry, D=D, COLUMNS=columns, BLOCKS=_blocks(D))
                    for entry in ("mass_rows", "mass_chunks"))  # fmt: skip
    return rows, chunks


def _blocks(D: int) -> int:
    """Blocks at a time on a processor: 16 keys on their way and 16 at work take D / 2 registers."""
    return 3 if D <= 128 else 2
