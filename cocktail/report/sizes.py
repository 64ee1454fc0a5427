"""Where every byte of a plan's cache is: the parts of runtime.arena, per layer and tier, that add up to its size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from runtime.arena import ArenaLayout
from runtime.formats import Kind, block_bytes
from runtime.plan import Layout, Plan, Tier

What = Literal["codes", "metadata", "tail", "packed tail", "positions", "alignment"]
_KINDS: tuple[Kind, Kind] = ("K", "V")


@dataclass(frozen=True)
class Part:
    """Some bytes of the arena.

    layer: None for what all layers share. tier: whose chunks; None for what no tier has. kind: K, V or, for positions
    and alignment, "". bits: width of the codes; 16 in the tail. what: codes, metadata (scales, zeros, levels,
    outliers), the FP16 tail, the room for what the tail gives up, the chunks' positions, or padding.
    """

    layer: int | None
    tier: Tier | None
    kind: str
    bits: int
    what: What
    nbytes: int


def parts(plan: Plan) -> list[Part]:
    """Every part that is not empty; the sum of their bytes is ArenaLayout(plan.layout).nbytes."""
    layout, arena = plan.layout, ArenaLayout(plan.layout)
    found = []
    for layer, placed in enumerate(arena.layers):
        own = [*_chunks(layout, layer), *_tail(layout, layer)]
        found += [*own, Part(layer, None, "", 0, "alignment", placed.nbytes - total(own))]
    positions = Part(None, None, "", 0, "positions", 4 * layout.tail_capacity)
    found += [positions, Part(None, None, "", 0, "alignment", arena.nbytes - total(found) - positions.nbytes)]
    return [part for part in found if part.nbytes]


def total(some: Iterable[Part]) -> int:
    """Their bytes."""
    return sum(part.nbytes for part in some)


def _chunks(layout: Layout, layer: int) -> Iterable[Part]:
    for tier, count in zip(layout.tiers, layout.counts[layer], strict=True):
        for kind, bits in zip(_KINDS, (tier.k_bits, tier.v_bits), strict=True):
            codes, metadata = _stored(layout, kind, bits, count)
            yield Part(layer, tier, kind, bits, "codes", codes)
            yield Part(layer, tier, kind, bits, "metadata", metadata)
        yield Part(layer, tier, "", 0, "positions", 4 * count if tier.k_bits else 0)


def _tail(layout: Layout, layer: int) -> Iterable[Part]:
    room = layout.flushed(layout.max_new)
    for kind in _KINDS:
        yield Part(layer, None, kind, 16, "tail", 2 * layout.n_kv_heads * layout.tail_capacity * layout.head_dim)
        bits = layout.lowest.k_bits if kind == "K" else layout.lowest.v_bits
        yield Part(layer, None, kind, bits, "packed tail", sum(_stored(layout, kind, bits, room)))
    yield Part(layer, None, "", 0, "positions", 4 * room)


def _stored(layout: Layout, kind: Kind, bits: int, chunks: int) -> tuple[int, int]:
    """Bytes of codes and of metadata of so many chunks."""
    block = block_bytes(kind, bits, layout.chunk, layout.head_dim, layout.formats)
    return (layout.n_kv_heads * chunks * block.codes,
            chunks * (layout.n_kv_heads * block.meta + block.shared))
