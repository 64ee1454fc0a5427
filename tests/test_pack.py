"""Packing on every instruction set equals runtime.formats bit for bit, and writes its own bytes and no others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ref
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import KINDS, chunk_sizes, head_dims, kinds, seeds, several, tiers, values

from kernels_c import CpuBackend, KernelError, available_isas
from runtime import formats
from runtime.arena import ArenaLayout
from runtime.backend import Span, Tail
from runtime.plan import FP16, Layout, Tier

ISAS = available_isas()
BACKENDS = {isa: CpuBackend(threads=1, isa=isa) for isa in ISAS}
POISON = 0xA5
GUARD = 256

on_every_isa = pytest.mark.parametrize("backend", BACKENDS.values(), ids=ISAS)


def layout_of(head_dim: int, chunk: int, kv_heads: int, tiers: tuple[Tier, ...], counts: tuple[int, ...]) -> Layout:
    return Layout(n_layers=1, n_kv_heads=kv_heads, head_dim=head_dim, chunk=chunk, n_chunks=sum(counts), prefix=3,
                  remainder=0, suffix=2, max_new=4, window=None, tiers=tiers, counts=(counts,))


Packing = tuple[Layout, tuple[int, ...], str, str, int]  # the chunks' order, kinds of K and V values, seed


@st.composite
def packings(draw: st.DrawFn) -> Packing:
    """Two tiers may share a width's region, and a tier may be empty."""
    chosen = tuple(draw(st.lists(tiers, min_size=1, max_size=3, unique=True)))
    counts = tuple(draw(st.integers(0, 3)) for _ in chosen)
    layout = layout_of(draw(head_dims), draw(chunk_sizes), draw(st.integers(1, 3)), chosen, counts)
    order = draw(st.permutations(range(layout.n_chunks)))
    return layout, tuple(order), draw(kinds), draw(kinds), draw(seeds)


def owned(layout: Layout, span: Span) -> list[tuple[int, int]]:
    """(offset, bytes) of everything that packing a span may write."""
    ranges = [(span.positions, 4 * span.n)]
    for kind, bits, codes, codes_stride, meta, meta_stride in (
            ("K", span.k_bits, span.k_codes, span.k_codes_stride, span.k_meta, span.k_meta_stride),
            ("V", span.v_bits, span.v_codes, span.v_codes_stride, span.v_meta, span.v_meta_stride)):
        codes_bytes, meta_bytes, _ = formats.block_bytes(kind, bits, layout.chunk, layout.head_dim)
        for g in range(layout.n_kv_heads):
            ranges += [(codes + g * codes_stride, span.n * codes_bytes), (meta + g * meta_stride, span.n * meta_bytes)]
    return ranges


def check_packing(backend: CpuBackend, layout: Layout, order: tuple[int, ...], k: Any, v: Any) -> None:
    """Packs each tier in turn; k, v (G, prompt, D) float16."""
    sizes = ArenaLayout(layout)
    G, D, C = layout.n_kv_heads, layout.head_dim, layout.chunk
    whole = backend.empty((sizes.nbytes + 2 * GUARD,), np.uint8)
    whole[:] = POISON
    arena = whole[GUARD : GUARD + sizes.nbytes]
    untouched, done = np.ones(len(whole), bool), 0
    packed = []
    for span in sizes.spans(0):
        starts = np.array([layout.start(chunk) for chunk in order[done : done + span.n]], np.int32)
        done += span.n
        backend.pack(backend.upload(k), backend.upload(v), arena, span, starts, C)
        packed.append((span, starts))
        for offset, nbytes in owned(layout, span) if span.n else ():
            untouched[GUARD + offset : GUARD + offset + nbytes] = False
    assert (whole[untouched] == POISON).all(), "packing wrote outside its blocks"
    for span, starts in packed:  # after all: no tier may have overwritten another
        if span.n == 0:
            continue
        raw = np.asarray(arena)
        assert (raw[span.positions :][: 4 * span.n].view(np.int32) == starts).all()
        rows = starts[:, None] + np.arange(C)
        for kind, bits, x in (("K", span.k_bits, k[:, rows]), ("V", span.v_bits, v[:, rows])):
            if bits == 16:
                codes, stride = (span.k_codes, span.k_codes_stride) if kind == "K" else (
                    span.v_codes, span.v_codes_stride)
                assert ref.read_half(raw, codes, stride, G, span.n, C, D).tobytes() == x.tobytes()
            elif kind == "K":
                got_k, want_k = ref.read_k(raw, span, G, D, C), formats.encode_k(x, bits)
                for name in ("codes", "scales", "zeros"):
                    np.testing.assert_array_equal(getattr(got_k, name), getattr(want_k, name), f"K{bits} {name}")
                assert got_k.base.tobytes() == want_k.base.tobytes(), f"K{bits} bases"
            else:
                got_v, want_v = ref.read_v(raw, span, G, D, C), formats.encode_v(x, bits)
                np.testing.assert_array_equal(got_v.codes, want_v.codes, f"V{bits} codes")
                assert got_v.scales.tobytes() == want_v.scales.tobytes(), f"V{bits} scales"


@on_every_isa
@several
@given(packing=packings())
@example(packing=(layout_of(64, 32, 3, (Tier(3, 2), Tier(4, 2)), (1, 1)), (1, 0), "outliers", "outliers", 0))
@example(packing=(layout_of(8, 8, 1, (Tier(3, 3),), (1,)), (0,), "steps", "steps", 0))
@example(packing=(layout_of(256, 256, 1, (Tier(2, 8),), (1,)), (0,), "largest", "largest", 0))
def test_packing_equals_the_formats(backend: CpuBackend, packing: Packing) -> None:
    layout, order, k_kind, v_kind, seed = packing
    shape = layout.n_kv_heads, layout.prompt_tokens, layout.head_dim
    check_packing(backend, layout, order, values(k_kind, seed, shape), values(v_kind, seed + 1, shape))


@on_every_isa
@pytest.mark.parametrize("kind", KINDS)
def test_every_width_of_every_hostile_kind(backend: CpuBackend, kind: str) -> None:
    layout = layout_of(80, 24, 2, tuple(Tier(bits, bits) for bits in (2, 3, 4, 8, 16)), (1, 2, 1, 2, 1))
    x = values(kind, 5, (2, layout.prompt_tokens, 80))
    check_packing(backend, layout, tuple(range(7)), x, x)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_write_the_same_bytes(threads: int) -> None:
    layout = layout_of(64, 32, 2, (Tier(3, 2),), (9,))
    x = values("normal", 3, (2, layout.prompt_tokens, 64))
    check_packing(CpuBackend(threads=threads), layout, tuple(reversed(range(9))), x, x)
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
    for rows, slot, message in [([0, 1], tail.capacity - 1, "slots"), ([0], -1, "slots"), ([500], 0, "rows"),
                                ([-1], 0, "rows")]:
        with pytest.raises(KernelError, match=message):
            backend.copy_tail(x, x, np.array(rows, np.int32), arena, tail, slot)
    assert (arena == POISON).all()


def test_kernels_are_named_with_their_instruction_set() -> None:
    for isa, backend in BACKENDS.items():
        assert backend.kernels().items() >= {("pack", f"pack_{isa}"), ("decode_attention", f"decode_attention_{isa}")}


def test_block_sizes_agree_with_the_formats() -> None:
    """The kernels may not import runtime and so keep their own arithmetic."""
    from kernels_c.cache_ops import _block_bytes

    for tier in (Tier(2, 2), Tier(3, 3), Tier(4, 4), Tier(8, 8), FP16):
        for chunk in range(8, 257, 8):
            for dim in range(8, 257, 8):
                for kind in ("K", "V"):
                    assert _block_bytes(kind, tier.k_bits, chunk, dim) == formats.block_bytes(
                        kind, tier.k_bits, chunk, dim)[:2]
