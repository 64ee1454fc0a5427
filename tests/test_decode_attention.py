"""Decode attention on every instruction set: against float64, against the dense cache bit for bit, and at its edges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import ref
from hypothesis import example, given
from strategies import Case, cases, cells, count, dense_cases, several

from kernels_c import CpuBackend, KernelError, available_isas
from runtime.arena import ArenaLayout
from runtime.backend import STATE_SIZE, Tail
from runtime.plan import FP16, HIDDEN, Layout, Tier

ISAS = available_isas()
BACKENDS = {isa: CpuBackend(threads=1, isa=isa) for isa in ISAS}
GUARD = 256  # bytes of poison on either side of an arena, elements on either side of an output
POISON = 0xFF  # NaN as FP16 and float32, the largest code everywhere else

on_every_isa = pytest.mark.parametrize("backend", BACKENDS.values(), ids=ISAS)


@dataclass
class Stored:
    """A case in a backend's arena, ready to attend."""

    case: Case
    backend: CpuBackend
    whole: Any  # the arena and its guard bands

    def __post_init__(self) -> None:
        layout, backend = self.case.layout, self.backend
        self.sizes = ArenaLayout(layout)
        self.whole = backend.empty((self.sizes.nbytes + 2 * GUARD,), np.uint8)
        self.whole[:] = POISON
        self.arena = self.whole[GUARD : GUARD + self.sizes.nbytes]
        self.spans, self.tail = self.sizes.spans(0), self.sizes.tail(0)
        self.q, self.k, self.v = self.case.arrays()
        k, v = backend.upload(self.k), backend.upload(self.v)
        for tier, span in enumerate(self.spans):
            starts = np.array([layout.start(chunk) for chunk in self.case.chunks(tier)], np.int32)
            if layout.tiers[tier] != HIDDEN:
                backend.pack(k, v, self.arena, span, starts, layout.chunk)
        context = range(layout.prefix, layout.start(layout.n_chunks))
        self.rows = np.array([row for row in range(self.case.tokens) if row not in context], np.int32)
        backend.copy_tail(k, v, self.rows, self.arena, self.tail, 0)
        self.bound = backend.bind(self.arena, self.spans, self.tail, self.case.heads, layout.n_kv_heads,
                                  layout.head_dim, layout.chunk, layout.window)
        self.state = np.zeros(STATE_SIZE, np.int32)
        self.state[:2] = self.case.tokens - 1, len(self.rows) - 1

    def attend(self) -> Any:
        """(H, D) float32; fails on a write outside the output or the arena."""
        H, D = self.q.shape
        before = self.whole.copy()
        out = np.full(H * D + 2 * GUARD, np.nan, np.float32)
        self.backend.decode_attention(self.q.reshape(1, H, D), self.bound, self.state,
                                      out[GUARD:-GUARD].reshape(1, H * D))
        assert np.isnan(out[:GUARD]).all() and np.isnan(out[-GUARD:]).all(), "wrote outside the output"
        assert (self.whole == before).all(), "attention wrote to the cache"
        assert (self.whole[:GUARD] == POISON).all() and (self.whole[-GUARD:] == POISON).all(), "left the arena"
        return out[GUARD:-GUARD].reshape(H, D)

    def reference(self) -> tuple[Any, Any]:
        """ref.attention over what the arena holds, in the kernel's order: prefix, spans, rest of the tail."""
        layout, arena = self.case.layout, np.asarray(self.arena)
        G, D, C = layout.n_kv_heads, layout.head_dim, layout.chunk
        head, rest = self.rows[: layout.prefix], self.rows[layout.prefix :]
        keys, values, positions = [ref.half(self.k[:, head])], [ref.half(self.v[:, head])], [head]
        for tier, span in enumerate(self.spans):
            if span.n == 0:
                continue
            starts = [layout.start(chunk) for chunk in self.case.chunks(tier)]
            positions.append((np.array(starts)[:, None] + np.arange(C)).ravel())
            if span.k_bits == 16:
                keys.append(ref.half(ref.read_half(arena, span.k_codes, span.k_codes_stride, G, span.n, C, D)
                                     .reshape(G, -1, D)))
            else:
                keys.append(ref.coded_k(ref.read_k(arena, span, G, D, C)))
            if span.v_bits == 16:
                values.append(ref.half(ref.read_half(arena, span.v_codes, span.v_codes_stride, G, span.n, C, D)
                                       .reshape(G, -1, D)))
            else:
                values.append(ref.coded_v(ref.read_v(arena, span, G, D, C)))
        keys.append(ref.half(self.k[:, rest]))
        values.append(ref.half(self.v[:, rest]))
        position = np.concatenate([*positions, rest])
        window = layout.window or self.case.tokens
        return ref.attention(self.q, keys, values, self.case.tokens - 1 - position < window)


def plain_case(**changes: Any) -> Case:
    """Three chunks at K3V2 of 32 tokens, unless `changes` (fields of Layout or Case) say otherwise."""
    layout: dict[str, Any] = {
        "n_layers": 1, "n_kv_heads": 2, "head_dim": 64, "chunk": 32, "n_chunks": 3, "prefix": 5, "remainder": 7,
        "suffix": 9, "max_new": 2, "window": None, "tiers": (Tier(3, 2),), "counts": ((3,),)}
    layout |= {name: changes.pop(name) for name in list(changes) if name in layout}
    n = layout["n_chunks"]
    fields: dict[str, Any] = {"order": tuple(range(n)), "assignment": (0,) * n, "group": 3, "new": 0,
                              "k_kind": "normal", "v_kind": "normal", "q_scale": 1.0, "seed": 1}
    return Case(Layout(**layout), **fields | changes)


ALONE = plain_case(n_chunks=0, prefix=0, remainder=0, suffix=0, counts=((0,),))  # the first token, nothing before it


@on_every_isa
@several
@given(case=cases())
@example(case=ALONE)
@example(case=plain_case(prefix=0, remainder=0, suffix=0))
@example(case=plain_case(window=1, prefix=0))
def test_attention_equals_float64_on_the_stored_values(backend: CpuBackend, case: Case) -> None:
    count("decode attention", cells(case), case.tokens)
    stored = Stored(case, backend, None)
    out = stored.attend()
    exact, bound = stored.reference()
    assert np.isfinite(bound).all()
    worst = (np.abs(out - exact) / np.maximum(bound, 1e-300)).max()
    assert worst <= 1, f"{worst:.2f} times the allowed error"


@on_every_isa
@several
@given(case=dense_cases)
@example(case=plain_case(tiers=(FP16,), prefix=3, k_kind="outliers", q_scale=4.0))
def test_all_fp16_in_document_order_equals_the_dense_cache_bit_for_bit(backend: CpuBackend, case: Case) -> None:
    layout = case.layout
    # The same tokens as one tail of which nothing is in chunks.
    dense = replace(case, order=(), assignment=(), new=case.new, layout=replace(
        layout, n_chunks=0, counts=((0, 0) if len(layout.tiers) == 2 else (0,),), prefix=layout.prompt_tokens,
        remainder=0, suffix=0))
    assert Stored(case, backend, None).attend().tobytes() == Stored(dense, backend, None).attend().tobytes()


@on_every_isa
@several
@given(case=cases())
def test_results_depend_on_neither_threads_nor_repetition(backend: CpuBackend, case: Case) -> None:
    alone = Stored(case, backend, None).attend()
    for threads in (2, 3):
        shared = Stored(case, CpuBackend(threads=threads, isa=backend.isa), None)
        assert shared.attend().tobytes() == shared.attend().tobytes() == alone.tobytes()
    CpuBackend(threads=1, isa=backend.isa)  # the pool belongs to the process: leave it as it was


@on_every_isa
def test_a_batch_equals_its_sequences_alone(backend: CpuBackend) -> None:
    """Sequences of other lengths and formats in one call."""
    batch = [Stored(case, backend, None) for case in (
        plain_case(), plain_case(tiers=(Tier(2, 4),), suffix=40, seed=2), plain_case(n_chunks=0, counts=((0,),)))]
    alone = [stored.attend() for stored in batch]
    q, out = np.stack([stored.q for stored in batch]), np.full((3, alone[0].size), np.nan, np.float32)
    states, bound = np.stack([stored.state for stored in batch]), backend.bind_batch([stored.bound for stored in batch])
    backend.decode_attention(q, bound, states, out)
    assert out.tobytes() == np.stack(alone).tobytes()
    with pytest.raises(KernelError, match="2, 3 and 3 rows for a batch of 3"):
        backend.decode_attention(q[:2], bound, states, out)


@on_every_isa
@pytest.mark.parametrize("tier", [Tier(2, 2), Tier(3, 4), Tier(8, 8), FP16], ids=str)
def test_the_bound_notices_one_missing_key(backend: CpuBackend, tier: Tier) -> None:
    stored = Stored(plain_case(tiers=(tier,)), backend, None)
    out = stored.attend()
    exact, bound = stored.reference()
    assert (np.abs(out - exact) <= bound).all()
    stored.state[1] -= 1  # hides the last token
    assert (np.abs(stored.attend() - exact) > bound).mean() > 0.9


@on_every_isa
def test_a_window_hides_what_lies_before_it(backend: CpuBackend) -> None:
    """NaN in every hidden key: not one may be read into the result."""
    case = plain_case(window=40, tiers=(FP16,))
    visible_from = case.tokens - 40
    k, v = case.arrays()[1:]
    stored = Stored(case, backend, None)
    expected = stored.attend()
    poisoned_k, poisoned_v = (backend.upload(x) for x in (k, v))
    poisoned_k[:, :visible_from], poisoned_v[:, :visible_from] = np.nan, np.nan
    starts = np.array([case.layout.start(chunk) for chunk in case.order], np.int32)
    backend.pack(poisoned_k, poisoned_v, stored.arena, stored.spans[0], starts, case.layout.chunk)
    backend.copy_tail(poisoned_k, poisoned_v, stored.rows, stored.arena, stored.tail, 0)
    assert stored.attend().tobytes() == expected.tobytes()


def test_bind_and_attend_refuse_what_does_not_fit() -> None:
    backend = BACKENDS[ISAS[-1]]
    stored = Stored(plain_case(), backend, None)
    spans, tail = stored.spans, stored.tail

    def bind(**changes: Any) -> Any:
        arguments = {"arena": stored.arena, "spans": spans, "tail": tail, "heads": 6, "kv_heads": 2, "head_dim": 64,
                     "chunk": 32, "window": None}
        return backend.bind(**arguments | changes)

    for changes, message in [
        ({"heads": 5}, "no multiple"), ({"window": 0}, "window is 0"), ({"head_dim": 20}, "head_dim is 20"),
        ({"head_dim": 264}, "head_dim is 264"), ({"chunk": 12}, "chunk is 12"), ({"chunk": 512}, "chunk is 512"),
        ({"spans": [replace(spans[0], k_bits=5)]}, "K at 5 bits"),
        ({"spans": [replace(spans[0], v_codes=stored.arena.size - 64)]}, "V2 codes"),
        ({"spans": [replace(spans[0], k_meta=-4)]}, "K3 meta"),
        ({"tail": Tail(tail.k, stored.arena.size, tail.positions, tail.capacity, tail.head)}, "tail V"),
        ({"tail": replace(tail, head=tail.capacity + 1)}, "head is"),
        ({"arena": stored.arena.view(np.int32)}, "uint8"),
    ]:
        with pytest.raises(KernelError, match=message):
            bind(**changes)
    for slot in (-1, tail.capacity):
        stored.state[1] = slot
        with pytest.raises(KernelError, match="slot"):
            stored.attend()
    stored.state[1] = 0
    stored.q = stored.q[:, :32]
    with pytest.raises(KernelError, match="q must be"):
        stored.attend()
