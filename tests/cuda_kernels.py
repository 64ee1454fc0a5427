"""The specialisations of the CUDA kernels that tests use: compiled ahead, so that drawing examples compiles nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from kernels_cu import attention, attention_mass, encoder, ends, linear
from kernels_cu.attention import HEAD_DIMS
from kernels_cu.build import Spec
from kernels_cu.cache_ops import MAX_GROUP, append_spec, attention_spec, merge_spec, pack_spec, ranges_spec
from kernels_cu.layout import WIDTHS as FAMILY_WIDTHS

GROUPS = range(1, MAX_GROUP + 1)
CODED = (2, 3, 4, 8)
WIDTHS = (*CODED, 16)
CHUNKS = (8, 16, 24, 32, 40, 64, 96)


class Configuration(NamedTuple):
    """What decode attention is specialised for. tiers: (K bits, V bits) of the formats in one cache."""

    head_dim: int
    group: int
    chunk: int
    tiers: tuple[tuple[int, int], ...]
    windowed: bool
    family: str = "rotated"
    flush: bool = False


BASELINES = {"kivi": ((2, 3), (4, 4), (8, 2), (3, 16), (16, 8)), "atom": ((4, 4), (16, 4), (4, 16)),
             "kvquant": ((4, 4), (3, 2), (2, 3), (16, 4), (3, 16))}  # fmt: skip


def configurations() -> list[Configuration]:
    """Every head_dim with every group size, once; each cache holds five formats with all widths of K and of V.

    The pairs of widths form five such sets, the diagonals of a square. head_dim i and group g take set i + g, so every
    pair of widths meets every head_dim and every group size. A chunk of 32, the default, is every second one; a cache
    of one format and one without quantized chunks come last, but for the other families.
    """
    sets = [tuple((k, WIDTHS[(i + shift) % 5]) for i, k in enumerate(WIDTHS)) for shift in range(5)]
    chosen = [Configuration(head_dim, group, 32 if (i + group) % 2 else CHUNKS[(2 * i + group) % len(CHUNKS)],
                            sets[(i + group) % 5], (i + group // 2) % 2 == 0)
              for (i, head_dim), group in product(enumerate(HEAD_DIMS), GROUPS)]
    mixes = (((3, 2), (4, 4), (16, 16)), ((16, 16),), ((3, 2),), ((2, 2), (8, 16)))
    chosen += [Configuration(head_dim, group, 32, mix, False)
               for head_dim, group, mix in product((64, 128), (1, 4, 8), mixes)]
    return chosen + [Configuration(head_dim, group, chunk, tiers, windowed, family, flush)
                     for family, tiers in BASELINES.items() for head_dim, group, chunk, windowed, flush in (
                         (64, 3, 40, True, True), (80, 2, 32, False, True), (96, 5, 24, False, False),
                         (128, 1, 32, False, True), (128, 4, 32, False, False), (128, 16, 64, True, False),
                         (256, 4, 96, False, True)) if family != "kvquant" or head_dim < 256]


def compile_cover(architecture: int, step: int = 1) -> Iterator[Spec]:
    """Kernels for one architecture; step: take every step-th configuration of decode attention."""
    yield from dict.fromkeys((
        *linear.compile_cover(), *attention.compile_cover(architecture), *attention_mass.compile_cover(),
        *ends.compile_cover(), *encoder.compile_cover(),
        *(spec(head_dim) for head_dim in HEAD_DIMS for spec in (append_spec, merge_spec)),
        *_cache_specs(configurations()[::step])))


def _cache_specs(chosen: list[Configuration]) -> Iterator[Spec]:
    for head_dim, group, chunk, tiers, windowed, family, flush in chosen:
        yield attention_spec(head_dim, group, chunk, frozenset(tiers), windowed, family, flush)[0]
    for head_dim, chunk, family in dict.fromkeys((c.head_dim, c.chunk, c.family) for c in chosen):
        for bits, is_k in product(FAMILY_WIDTHS[family], (True, False)):
            yield pack_spec(is_k, bits, chunk, head_dim, family)[0]
        if family == "kvquant":
            yield from (ranges_spec(kv_heads, chunk, head_dim) for kv_heads in (1, 2, 3))
