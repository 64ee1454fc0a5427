"""Where everything of one sequence's cache lies in its one allocation. Pure arithmetic on a Layout; no device.

    layer 0: K regions by width | V regions by width | chunk positions per tier | tail K | tail V
    layer 1: ...
    tail positions (one array for all layers)

A region holds all chunks of one width: first the codes (KV head, chunk), then the metadata (KV head, chunk). Tiers that
share a width lie behind one another in its region, in tier order. Every part begins on a 64-byte boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from runtime.backend import Span, Tail
from runtime.formats import Kind, block_bytes
from runtime.plan import Layout

ALIGNMENT = 64


@dataclass(frozen=True)
class Region:
    """All chunks of one layer, one of K/V and one width. Offsets from the layer's start, sizes in bytes."""

    kind: Kind
    bits: int
    n: int
    codes: int
    codes_bytes: int  # of one chunk and KV head
    meta: int
    meta_bytes: int  # of one chunk and KV head


@dataclass(frozen=True)
class LayerArena:
    """One layer's part; offsets from the layer's start. spans[i] belongs to tier i and may be empty (n == 0)."""

    regions: tuple[Region, ...]
    spans: tuple[Span, ...]
    tail: Tail
    context_bytes: int  # regions and chunk positions
    nbytes: int


class ArenaLayout:
    """Offsets and sizes of a Layout's arena.

    nbytes: the whole allocation. context_bytes: what the chunks take in it, all metadata, positions and alignment
    counted, the tail not. fp16_bytes: K and V of the same tokens at 16 bits.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        distinct = {counts: _layer(layout, counts) for counts in set(layout.counts)}
        self.layers = tuple(distinct[counts] for counts in layout.counts)
        starts = [0]
        for layer in self.layers:
            starts.append(starts[-1] + layer.nbytes)
        self._starts, self.tail_positions = starts, starts[-1]
        self.nbytes = self.tail_positions + _align(4 * layout.tail_capacity)
        self.context_bytes = sum(layer.context_bytes for layer in self.layers)

    @cached_property
    def context_bits_per_value(self) -> float:
        """bpv: context bytes x 8 / context values, the sink's chunk in, the tail out; 16 where no chunk is stored.

        Chunks that a sliding window hides count on neither side.
        """
        layout = self.layout
        stored = sum(count for counts in layout.counts
                     for tier, count in zip(layout.tiers, counts, strict=True) if tier.k_bits)
        values = 2 * layout.n_kv_heads * layout.head_dim * layout.chunk * stored
        return 8 * self.context_bytes / values if values else 16.0

    @cached_property
    def fp16_bytes(self) -> int:
        layout = self.layout
        tokens = layout.prompt_tokens + layout.max_new
        return 4 * layout.n_layers * layout.n_kv_heads * layout.head_dim * tokens

    def spans(self, layer: int) -> tuple[Span, ...]:
        """The spans of one layer, one per tier, with offsets from the arena's start."""
        start = self._starts[layer]
        return tuple(Span(s.n, s.k_bits, s.v_bits, start + s.k_codes, s.k_codes_stride, start + s.k_meta,
                          s.k_meta_stride, start + s.v_codes, s.v_codes_stride, start + s.v_meta, s.v_meta_stride,
                          start + s.positions) for s in self.layers[layer].spans)

    def tail(self, layer: int) -> Tail:
        """The tail of one layer, with offsets from the arena's start."""
        start, tail = self._starts[layer], self.layers[layer].tail
        return Tail(start + tail.k, start + tail.v, self.tail_positions, tail.capacity, tail.head)


def _layer(layout: Layout, counts: tuple[int, ...]) -> LayerArena:
    heads, dim, chunk = layout.n_kv_heads, layout.head_dim, layout.chunk
    offset = 0

    def take(nbytes: int) -> int:
        nonlocal offset
        start = offset
        offset = _align(offset + nbytes)
        return start

    regions: dict[tuple[Kind, int], Region] = {}
    kinds: tuple[Kind, Kind] = ("K", "V")
    for kind in kinds:
        widths = [tier.k_bits if kind == "K" else tier.v_bits for tier in layout.tiers]
        for bits in sorted(set(widths) - {0}):
            n = sum(count for width, count in zip(widths, counts, strict=True) if width == bits)
            codes_bytes, meta_bytes = block_bytes(kind, bits, chunk, dim)
            regions[kind, bits] = Region(kind, bits, n, take(heads * n * codes_bytes), codes_bytes,
                                         take(heads * n * meta_bytes), meta_bytes)
    used = dict.fromkeys(regions, 0)  # chunks of each region that earlier tiers took
    spans = []
    for tier, n in zip(layout.tiers, counts, strict=True):
        positions = take(4 * n if tier.k_bits else 0)
        if not tier.k_bits:
            spans.append(Span(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, positions))
            continue
        k, v = regions["K", tier.k_bits], regions["V", tier.v_bits]
        k_used, v_used = used["K", tier.k_bits], used["V", tier.v_bits]
        spans.append(Span(n, tier.k_bits, tier.v_bits,
                          k.codes + k_used * k.codes_bytes, k.n * k.codes_bytes,
                          k.meta + k_used * k.meta_bytes, k.n * k.meta_bytes,
                          v.codes + v_used * v.codes_bytes, v.n * v.codes_bytes,
                          v.meta + v_used * v.meta_bytes, v.n * v.meta_bytes, positions))
        used["K", tier.k_bits] += n
        used["V", tier.v_bits] += n
    context_bytes = offset
    capacity = layout.tail_capacity
    tail = Tail(take(2 * heads * capacity * dim), take(2 * heads * capacity * dim), 0, capacity, layout.prefix)
    return LayerArena(tuple(regions.values()), tuple(spans), tail, context_bytes, offset)


def _align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
