"""Where everything of one sequence's cache lies in its one allocation. Pure arithmetic on a Layout; no device.

    layer 0: K regions by width | V regions by width | chunk positions per tier | tail K | tail V | flushed
    layer 1: ...
    tail positions (one array for all layers)

A region holds all chunks of one width: first the codes (KV head, chunk), then the metadata (KV head, chunk), then what
a format stores once for all heads (chunk). Tiers of one width lie behind one another in its region, in tier order. With
Layout.flush a K region, a V region and positions of their own take what the tail gives up. Every part begins on a
64-byte boundary.

With Layout.in_place a region holds one run of neighbours of one tier, and K's regions, then V's, follow one another as
the document does: mixed widths in place, every run a span of its own. It costs padding between runs and short spans;
the kernels are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from runtime.backend import Span, Tail
from runtime.formats import Kind, block_bytes
from runtime.plan import Layout, Tier, runs

ALIGNMENT = 64
_KINDS: tuple[Kind, Kind] = ("K", "V")
_OFFSETS = ("k_codes", "k_meta", "v_codes", "v_meta", "v_shared", "positions")  # of a Span


@dataclass(frozen=True)
class Region:
    """All chunks of one layer, one of K/V and one width; in place, one run of them.

    Offsets from the layer's start, sizes in bytes.
    """

    kind: Kind
    bits: int
    n: int
    codes: int
    codes_bytes: int  # of one chunk and KV head
    meta: int
    meta_bytes: int  # of one chunk and KV head
    shared: int
    shared_bytes: int  # of one chunk


@dataclass(frozen=True)
class LayerArena:
    """One layer's part; offsets from the layer's start. spans[i] belongs to tier i, in place to run i, and may be empty
    (n == 0). flushed: room for every chunk that the tail can give up; None where it gives up none."""

    regions: tuple[Region, ...]
    spans: tuple[Span, ...]
    tail: Tail
    flushed: Span | None
    context_bytes: int  # regions and chunk positions
    nbytes: int


class ArenaLayout:
    """Offsets and sizes of a Layout's arena.

    nbytes: the whole allocation. context_bytes: what the chunks take in it, all metadata, positions and alignment
    counted, the tail not. fp16_bytes: K and V of the same tokens at 16 bits.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        if layout.in_place is None:
            sized = {counts: _layer(layout, counts) for counts in set(layout.counts)}
            self.layers = tuple(sized[counts] for counts in layout.counts)
        else:
            placed = {chunks: _layer_in_place(layout, chunks) for chunks in set(layout.in_place)}
            self.layers = tuple(placed[chunks] for chunks in layout.in_place)
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
        """The spans of one layer, one per tier (in place: per run), with offsets from the arena's start."""
        return tuple(self._placed(layer, span) for span in self.layers[layer].spans)

    def flushed(self, layer: int) -> Span | None:
        """The room of one layer for what the tail gives up, with offsets from the arena's start."""
        span = self.layers[layer].flushed
        return None if span is None else self._placed(layer, span)

    def part(self, span: Span, first: int, n: int) -> Span:
        """n chunks of a span from the first-th on, as a span of their own."""
        layout, family = self.layout, span.formats
        k = block_bytes("K", span.k_bits, layout.chunk, layout.head_dim, family)
        v = block_bytes("V", span.v_bits, layout.chunk, layout.head_dim, family)
        return replace(span, n=n, k_codes=span.k_codes + first * k.codes, k_meta=span.k_meta + first * k.meta,
                       v_codes=span.v_codes + first * v.codes, v_meta=span.v_meta + first * v.meta,
                       positions=span.positions + 4 * first, v_shared=span.v_shared + first * v.shared)

    def tail(self, layer: int) -> Tail:
        """The tail of one layer, with offsets from the arena's start."""
        start, tail = self._starts[layer], self.layers[layer].tail
        return Tail(start + tail.k, start + tail.v, self.tail_positions, tail.capacity, tail.head)

    def _placed(self, layer: int, span: Span) -> Span:
        start = self._starts[layer]
        return replace(span, **{name: getattr(span, name) + start for name in _OFFSETS})


class _Offsets:
    """Hands out parts one behind the other, each on a boundary."""

    def __init__(self) -> None:
        self.end = 0

    def take(self, nbytes: int) -> int:
        start = self.end
        self.end = _align(start + nbytes)
        return start


def _layer(layout: Layout, counts: tuple[int, ...]) -> LayerArena:
    offsets = _Offsets()
    regions: dict[tuple[Kind, int], Region] = {}
    for kind in _KINDS:
        widths = [_bits(tier, kind) for tier in layout.tiers]
        for bits in sorted(set(widths) - {0}):
            n = sum(count for width, count in zip(widths, counts, strict=True) if width == bits)
            regions[kind, bits] = _region(layout, offsets, kind, bits, n)
    used = dict.fromkeys(regions, 0)  # chunks of each region that earlier tiers took
    spans = []
    for tier, n in zip(layout.tiers, counts, strict=True):
        positions = offsets.take(4 * n if tier.k_bits else 0)
        if not tier.k_bits:
            spans.append(_empty(layout, positions))
            continue
        k: tuple[Kind, int] = ("K", tier.k_bits)
        v: tuple[Kind, int] = ("V", tier.v_bits)
        spans.append(_span(layout, n, regions[k], used[k], regions[v], used[v], positions))
        used[k] += n
        used[v] += n
    return _with_tail(layout, offsets, regions.values(), spans)


def _layer_in_place(layout: Layout, chunks: tuple[int, ...]) -> LayerArena:
    offsets = _Offsets()
    parts = [(layout.tiers[tier], n) for tier, n in runs(chunks)]
    regions: dict[tuple[Kind, int], Region] = {}  # of K or V and the run's number
    for kind in _KINDS:
        for i, (tier, n) in enumerate(parts):
            if tier.k_bits:
                regions[kind, i] = _region(layout, offsets, kind, _bits(tier, kind), n)
    spans, positions = [], offsets.take(4 * sum(n for tier, n in parts if tier.k_bits))
    for i, (tier, n) in enumerate(parts):
        spans.append(_span(layout, n, regions["K", i], 0, regions["V", i], 0, positions) if tier.k_bits
                     else _empty(layout, positions))
        positions += 4 * n if tier.k_bits else 0
    return _with_tail(layout, offsets, regions.values(), spans)


def _region(layout: Layout, offsets: _Offsets, kind: Kind, bits: int, n: int) -> Region:
    codes, meta, shared = block_bytes(kind, bits, layout.chunk, layout.head_dim, layout.formats)
    heads = layout.n_kv_heads
    return Region(kind, bits, n, offsets.take(heads * n * codes), codes, offsets.take(heads * n * meta), meta,
                  offsets.take(n * shared), shared)


def _span(layout: Layout, n: int, k: Region, k_used: int, v: Region, v_used: int, positions: int) -> Span:
    """n chunks that begin behind the first k_used and v_used of their regions."""
    return Span(n, k.bits, v.bits,
                k.codes + k_used * k.codes_bytes, k.n * k.codes_bytes,
                k.meta + k_used * k.meta_bytes, k.n * k.meta_bytes,
                v.codes + v_used * v.codes_bytes, v.n * v.codes_bytes,
                v.meta + v_used * v.meta_bytes, v.n * v.meta_bytes, positions,
                layout.formats, v.shared + v_used * v.shared_bytes)


def _empty(layout: Layout, positions: int) -> Span:
    return Span(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, positions, layout.formats)


def _with_tail(layout: Layout, offsets: _Offsets, regions: Iterable[Region], spans: list[Span]) -> LayerArena:
    context_bytes, capacity = offsets.end, layout.tail_capacity
    half = 2 * layout.n_kv_heads * capacity * layout.head_dim
    tail = Tail(offsets.take(half), offsets.take(half), 0, capacity, layout.prefix)
    flushed = None
    if room := layout.flushed(layout.max_new):
        tier = layout.lowest
        k, v = (_region(layout, offsets, kind, _bits(tier, kind), room) for kind in _KINDS)
        flushed = _span(layout, room, k, 0, v, 0, offsets.take(4 * room))
    return LayerArena(tuple(regions), tuple(spans), tail, flushed, context_bytes, offsets.end)


def _bits(tier: Tier, kind: Kind) -> int:
    return tier.k_bits if kind == "K" else tier.v_bits


def _align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
