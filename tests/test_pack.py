"""Packing on every instruction set equals runtime.formats bit for bit, and writes its own bytes and no others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import ref
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import KINDS, chunk_sizes, format_data, head_dims, kinds, seeds, several, tiers_of, values

from kernels_c import CpuBackend, KernelError, available_isas
from runtime import formats
from runtime.arena import ArenaLayout
from runtime.backend import FormatData, Span, Tail
from runtime.formats import FAMILIES, PRE_ROPE, WIDTHS, Kind, atom, kivi, kvquant
from runtime.plan import Layout, Tier

ISAS = available_isas()
BACKENDS = {isa: CpuBackend(threads=1, isa=isa) for isa in ISAS}
POISON = 0xA5
GUARD = 256

on_every_isa = pytest.mark.parametrize("backend", BACKENDS.values(), ids=ISAS)


def layout_of(head_dim: int, chunk: int, kv_heads: int, tiers: tuple[Tier, ...], counts: tuple[int, ...],
              family: str = "rotated") -> Layout:
    return Layout(n_layers=1, n_kv_heads=kv_heads, head_dim=head_dim, chunk=chunk, n_chunks=sum(counts), prefix=3,
                  remainder=0, suffix=2, max_new=4, window=None, tiers=tiers, counts=(counts,), formats=family)


@dataclass(frozen=True)
class Packing:
    """moved: how far the positions are from the rows' numbers, as where the tail is packed."""

    layout: Layout
    order: tuple[int, ...]
    k_kind: str = "normal"
    v_kind: str = "normal"
    seed: int = 0
    moved: int = 0

    def arrays(self) -> tuple[Any, Any]:
        """k, v (G, prompt, D) float16."""
        shape = self.layout.n_kv_heads, self.layout.prompt_tokens, self.layout.head_dim
        return values(self.k_kind, self.seed, shape), values(self.v_kind, self.seed + 1, shape)

    def data(self) -> FormatData:
        layout = self.layout
        return format_data(self.seed, layout.prompt_tokens + self.moved, layout.n_kv_heads, layout.head_dim)


@st.composite
def packings(draw: st.DrawFn) -> Packing:
    """Two tiers may share a width's region, and a tier may be empty."""
    family = draw(st.sampled_from(FAMILIES))
    chosen = tuple(draw(st.lists(tiers_of(family), min_size=1, max_size=3, unique=True)))
    counts = tuple(draw(st.integers(0, 3)) for _ in chosen)
    layout = layout_of(draw(head_dims), draw(chunk_sizes), draw(st.integers(1, 3)), chosen, counts, family)
    order = draw(st.permutations(range(layout.n_chunks)))
    return Packing(layout, tuple(order), draw(kinds), draw(kinds), draw(seeds), draw(st.sampled_from((0, 1, 70))))


def owned(layout: Layout, span: Span) -> list[tuple[int, int]]:
    """(offset, bytes) of everything that packing a span may write."""
    ranges = [(span.positions, 4 * span.n)]
    for kind, bits, codes, codes_stride, meta, meta_stride, shared in (
            ("K", span.k_bits, span.k_codes, span.k_codes_stride, span.k_meta, span.k_meta_stride, 0),
            ("V", span.v_bits, span.v_codes, span.v_codes_stride, span.v_meta, span.v_meta_stride, span.v_shared)):
        size = formats.block_bytes(kind, bits, layout.chunk, layout.head_dim, span.formats)
        for g in range(layout.n_kv_heads):
            ranges += [(codes + g * codes_stride, span.n * size.codes), (meta + g * meta_stride, span.n * size.meta)]
        ranges.append((shared, span.n * size.shared))
    return ranges


Parts = dict[str, Any]  # name -> array (N, G, ...), or (N, ...) of what all heads share


def packed(kind: Kind, raw: Any, span: Span, G: int, D: int, C: int) -> Parts:
    """What lies in the arena, in runtime.formats' terms; the CPU's layout is that of kernels_c/src/streams.h and
    baselines.h."""
    if kind == "K":
        bits, where = span.k_bits, (span.k_codes, span.k_codes_stride, span.k_meta, span.k_meta_stride)
    else:
        bits, where = span.v_bits, (span.v_codes, span.v_codes_stride, span.v_meta, span.v_meta_stride)
    size = formats.block_bytes(kind, bits, C, D, span.formats)
    words = ref.read_blocks(raw, where[0], where[1], G, span.n, size.codes).swapaxes(0, 1)
    meta = ref.read_blocks(raw, where[2], where[3], G, span.n, size.meta).swapaxes(0, 1).copy()
    if bits == 16:
        return {"values": words.copy().view(np.float16).reshape(span.n, G, C, D)}
    streams, length = (C, D) if kind == "K" else (D, C)
    codes = ref.read_codes(words.copy(), streams, length, bits)
    codes = codes if kind == "K" else codes.swapaxes(-1, -2)
    if span.formats == "rotated":
        if kind == "V":
            return {"codes": codes, "scales": meta.view(np.uint16)}
        return {"codes": codes, "scales": meta[..., :D], "zeros": meta[..., D : 2 * D].view(np.int8),
                "base": meta[..., 2 * D :].copy().view(np.uint16)}
    if span.formats != "kvquant":  # scales, then zeros, in planes
        lines = D if kind == "K" and span.formats == "kivi" else C
        planes = meta.view(np.float16).reshape(span.n, G, 2, -1, lines)
        if kind == "K" or span.formats == "atom":
            return {"codes": codes, "scales": planes[:, :, 0, 0], "zeros": planes[:, :, 1, 0]}
        return {"codes": codes, "scales": planes[:, :, 0].swapaxes(-1, -2), "zeros": planes[:, :, 1].swapaxes(-1, -2)}
    entries = meta.view(np.uint16)
    parts = {"codes": codes, "kept": entries[..., 0], "overflowed": entries[..., 1], "index": entries[..., 2::2],
             "values": entries[..., 3::2].copy().view(np.float16)}
    if kind == "V":
        shared = raw[span.v_shared :][: 4 * C * span.n].view(np.float16).reshape(span.n, 2, C)
        parts |= {"centre": shared[:, 0], "half": shared[:, 1]}
    return parts


def expected(kind: Kind, x: Any, bits: int, family: str, tokens: Any, data: FormatData) -> Parts:
    """The same by runtime.formats; x (N, G, C, D), tokens (N, C) their positions."""
    if bits == 16:
        return {"values": x}
    if kind == "K" and family in PRE_ROPE:
        x = formats.turn_back(x, data.cos[tokens][:, None], data.sin[tokens][:, None])
    if family == "kivi":
        return vars(kivi.encode_k(x, bits) if kind == "K" else kivi.encode_v(x, bits))
    if family == "atom":
        return vars(atom.encode(x))
    if family == "kvquant":
        levels = kvquant.levels_of(data.k_levels if kind == "K" else data.v_levels, bits)
        encoded: Any = (kvquant.encode_k(x, bits, levels, data.k_centre, data.k_half) if kind == "K"
                        else kvquant.encode_v(x, bits, levels))
        return {name: part for name, part in vars(encoded).items() if name != "sparse"} | vars(encoded.sparse)
    encoded = formats.encode_k(x, bits) if kind == "K" else formats.encode_v(x, bits)
    parts = dict(vars(encoded))
    name = "base" if kind == "K" else "scales"
    return parts | {name: (parts[name].view(np.uint32) >> 16).astype(np.uint16)}


def check_packing(backend: CpuBackend, packing: Packing) -> None:
    """Packs each tier in turn."""
    layout, data = packing.layout, packing.data()
    k, v = packing.arrays()
    sizes = ArenaLayout(layout)
    G, D, C = layout.n_kv_heads, layout.head_dim, layout.chunk
    whole = backend.empty((sizes.nbytes + 2 * GUARD,), np.uint8)
    whole[:] = POISON
    arena = whole[GUARD : GUARD + sizes.nbytes]
    untouched, done = np.ones(len(whole), bool), 0
    packed_spans = []
    uploaded = FormatData(**{name: backend.upload(part) for name, part in vars(data).items()})
    for span in sizes.spans(0):
        starts = np.array([layout.start(chunk) for chunk in packing.order[done : done + span.n]], np.int32)
        done += span.n
        positions = {"positions": starts + np.int32(packing.moved)} if packing.moved else {}
        backend.pack(backend.upload(k), backend.upload(v), arena, span, starts, C, **positions, data=uploaded)
        packed_spans.append((span, starts))
        for offset, nbytes in owned(layout, span) if span.n else ():
            untouched[GUARD + offset : GUARD + offset + nbytes] = False
    assert (whole[untouched] == POISON).all(), "packing wrote outside its blocks"
    raw = np.asarray(arena)
    for span, starts in packed_spans:  # after all: no tier may have overwritten another
        if span.n == 0:
            continue
        assert (raw[span.positions :][: 4 * span.n].view(np.int32) == starts + packing.moved).all()
        rows = starts[:, None] + np.arange(C)
        kinds: list[tuple[Kind, int, Any]] = [("K", span.k_bits, k), ("V", span.v_bits, v)]
        for kind, bits, x in kinds:
            got = packed(kind, raw, span, G, D, C)
            want = expected(kind, x[:, rows].swapaxes(0, 1), bits, layout.formats, rows + packing.moved, data)
            for name, part in got.items():
                assert part.dtype == want[name].dtype and part.tobytes() == want[name].tobytes(), \
                    f"{layout.formats} {kind}{bits} {name}"


@on_every_isa
@several
@given(packing=packings())
@example(packing=Packing(layout_of(64, 32, 3, (Tier(3, 2), Tier(4, 2)), (1, 1)), (1, 0), "outliers", "outliers"))
@example(packing=Packing(layout_of(8, 8, 1, (Tier(3, 3),), (1,)), (0,), "steps", "steps"))
@example(packing=Packing(layout_of(256, 256, 1, (Tier(2, 8),), (1,)), (0,), "largest", "largest"))
@example(packing=Packing(layout_of(256, 256, 2, (Tier(2, 3),), (1,), "kvquant"), (0,), "normal", "largest", moved=9))
def test_packing_equals_the_formats(backend: CpuBackend, packing: Packing) -> None:
    check_packing(backend, packing)


@on_every_isa
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_width_of_every_hostile_kind(backend: CpuBackend, kind: str, family: str) -> None:
    tiers = tuple(Tier(bits, bits) for bits in (*WIDTHS[family], 16))
    counts = tuple(1 + i % 2 for i in range(len(tiers)))
    layout = layout_of(80, 24, 2, tiers, counts, family)
    check_packing(backend, Packing(layout, tuple(range(sum(counts))), kind, kind, 5))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("tier", [("rotated", 3, 2), ("kvquant", 4, 3)], ids=str)
def test_threads_write_the_same_bytes(threads: int, tier: tuple[str, int, int]) -> None:
    layout = layout_of(64, 32, 2, (Tier(*tier[1:]),), (9,), tier[0])
    check_packing(CpuBackend(threads=threads), Packing(layout, tuple(reversed(range(9)))))
    CpuBackend(threads=1)  # the pool belongs to the process: leave it as it was


@on_every_isa
def test_copy_tail_copies_rows_and_positions(backend: CpuBackend) -> None:
    G, S, D, capacity = 2, 20, 16, 7
    half = 2 * G * capacity * D
    tail = Tail(0, half, 2 * half, capacity, 0)
    arena = backend.arena(2 * half + 4 * capacity)
    arena[:] = POISON
    k, v = values("normal", 1, (G, S, D)), values("normal", 2, (G, S, D))
    rows = np.array([0, 1, 17, 19], np.int32)
    backend.copy_tail(backend.upload(k), backend.upload(v), rows, arena, tail, 2)
    raw = np.asarray(arena)
    for offset, x in ((0, k), (half, v)):
        got = raw[offset : offset + half].reshape(G, capacity, 2 * D)
        assert got[:, 2:6].tobytes() == x[:, rows].tobytes()
        assert (got[:, :2] == POISON).all() and (got[:, 6:] == POISON).all()
    positions = raw[2 * half :].reshape(capacity, 4)
    assert positions[2:6].tobytes() == rows.tobytes()
    assert (positions[:2] == POISON).all() and (positions[6:] == POISON).all()


def test_what_does_not_fit_is_refused_and_nothing_is_written() -> None:
    backend = BACKENDS[ISAS[-1]]
    layout = layout_of(64, 32, 2, (Tier(3, 2),), (2,))
    sizes = ArenaLayout(layout)
    arena, span, tail = backend.arena(sizes.nbytes), sizes.spans(0)[0], sizes.tail(0)
    arena[:] = POISON
    x = backend.upload(values("normal", 0, (2, layout.prompt_tokens, 64)))
    starts = np.array([3, 35], np.int32)
    for arguments, message in [
        ((x, x, arena, span, starts[:1], 32), "starts has 1"),
        ((x, x, arena, span, starts + layout.prompt_tokens - 64, 32), "begin at rows"),
        ((x, x, arena, span, starts - 4, 32), "begin at rows"),
        ((x, x, arena, span, starts, 20), "chunk is 20"),
        ((x, x.astype(np.float32), arena, span, starts, 32), "v must be float16"),
        ((x, x[:1], arena, span, starts, 32), "v must be float16 of shape"),
        ((x, x, arena, replace(span, v_bits=0), starts, 32), "V at 0 bits"),
        ((x, x, arena, replace(span, positions=len(arena) - 4), starts, 32), "chunk positions"),
        ((x, x, arena, replace(span, v_meta=len(arena) - 64), starts, 32), "V2 meta"),
    ]:
        with pytest.raises(KernelError, match=message):
            backend.pack(*arguments)
    for rows, slot, message in [([0, 1], tail.capacity - 1, "slots"), ([0], -1, "slots"),
                                ([layout.prompt_tokens], 0, "rows"), ([-1], 0, "rows")]:
        with pytest.raises(KernelError, match=message):
            backend.copy_tail(x, x, np.array(rows, np.int32), arena, tail, slot)
    assert (arena == POISON).all()


def test_kernels_are_named_with_their_instruction_set() -> None:
    for isa, backend in BACKENDS.items():
        assert backend.kernels().items() >= {("pack", f"pack_{isa}"), ("decode_attention", f"decode_attention_{isa}")}


@pytest.mark.parametrize("family", FAMILIES)
def test_block_sizes_agree_with_the_formats(family: str) -> None:
    """The kernels may not import runtime and so keep their own arithmetic."""
    from kernels_c.cache_ops import _WIDTHS, _block_bytes

    assert WIDTHS == _WIDTHS
    for bits in (*WIDTHS[family], 16):
        for chunk in range(8, 257, 8):
            for dim in range(8, 257, 8):
                for kind in ("K", "V"):
                    assert _block_bytes(kind, bits, chunk, dim, family) == formats.block_bytes(
                        kind, bits, chunk, dim, family)
