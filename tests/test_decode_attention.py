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
from runtime.backend import STATE_FLUSHED, STATE_SIZE, STATE_SLOT, FormatData, Tail
from runtime.formats import FAMILIES
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
        self.spans, self.tail, self.room = self.sizes.spans(0), self.sizes.tail(0), self.sizes.flushed(0)
        self.q, self.k, self.v = self.case.arrays()
        self.data = self.case.data()
        self.uploaded = self.data and FormatData(**{name: backend.upload(x) for name, x in vars(self.data).items()})
        self.pack(self.k, self.v)
        self.bound = backend.bind(self.arena, self.spans, self.tail, self.case.heads, layout.n_kv_heads,
                                  layout.head_dim, layout.chunk, layout.window, self.room, self.uploaded)
        self.state = np.zeros(STATE_SIZE, np.int32)
        self.state[:2] = self.case.tokens - 1, len(self.rows) - 1
        self.state[STATE_FLUSHED] = self.case.flushed

    def pack(self, k: Any, v: Any) -> None:
        """k, v (G, tokens, D): context into the spans, all else into the tail, and out of that what it gives up."""
        layout, backend, C = self.case.layout, self.backend, self.case.layout.chunk
        uploaded = backend.upload(k), backend.upload(v)
        for tier, span in enumerate(self.spans):
            if layout.tiers[tier] != HIDDEN:
                backend.pack(*uploaded, self.arena, span, self.starts(tier), C, data=self.uploaded)
        context = range(layout.prefix, layout.start(layout.n_chunks))
        self.rows = np.array([row for row in range(self.case.tokens) if row not in context], np.int32)
        backend.copy_tail(*uploaded, self.rows, self.arena, self.tail, 0)
        if n := self.case.flushed:
            tail = (backend.upload(np.ascontiguousarray(x[:, self.rows])) for x in (k, v))
            slots = layout.prefix + C * np.arange(n, dtype=np.int32)
            backend.pack(*tail, self.arena, self.sizes.part(self.room, 0, n), slots, C, self.rows[slots], self.uploaded)

    def starts(self, tier: int) -> Any:
        return np.array([self.case.layout.start(chunk) for chunk in self.case.chunks(tier)], np.int32)

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
        """ref.attention over what storage leaves, in the kernel's order: prefix, spans, flushed, rest of the tail."""
        layout, C = self.case.layout, self.case.layout.chunk
        gone = layout.prefix + self.case.flushed * C
        head, rest = self.rows[: layout.prefix], self.rows[gone:]
        blocks = [(self.starts(i), tier) for i, tier in enumerate(layout.tiers) if tier != HIDDEN]
        blocks.append((self.rows[layout.prefix : gone : C], layout.lowest))
        keys, values, positions = [ref.half(self.k[:, head])], [ref.half(self.v[:, head])], [head]
        for starts, tier in blocks:
            if len(starts) == 0:
                continue
            tokens = starts[:, None] + np.arange(C)
            k, v = (x[:, tokens].swapaxes(0, 1) for x in (self.k, self.v))
            keys.append(ref.stored("K", k, tier.k_bits, layout.formats, tokens, self.data))
            values.append(ref.stored("V", v, tier.v_bits, layout.formats, tokens, self.data))
            positions.append(tokens.ravel())
        keys.append(ref.half(self.k[:, rest]))
        values.append(ref.half(self.v[:, rest]))
        position = np.concatenate([*positions, rest])
        window = layout.window or self.case.tokens
        return ref.attention(self.q, keys, values, self.case.tokens - 1 - position < window)


def plain_case(**changes: Any) -> Case:
    """Three chunks at K3V2 of 32 tokens, unless `changes` (fields of Layout or Case) say otherwise."""
    layout: dict[str, Any] = {
        "n_layers": 1, "n_kv_heads": 2, "head_dim": 64, "chunk": 32, "n_chunks": 3, "prefix": 5, "remainder": 7,
        "suffix": 9, "max_new": 2, "window": None, "tiers": (Tier(3, 2),), "counts": ((3,),),
        "formats": "rotated", "flush": None}
    layout |= {name: changes.pop(name) for name in list(changes) if name in layout}
    n = layout["n_chunks"]
    fields: dict[str, Any] = {"order": tuple(range(n)), "assignment": (0,) * n, "group": 3, "new": 0,
                              "k_kind": "normal", "v_kind": "normal", "q_scale": 1.0, "seed": 1}
    return Case(Layout(**layout), **fields | changes)


ALONE = plain_case(n_chunks=0, prefix=0, remainder=0, suffix=0, counts=((0,),))  # the first token, nothing before it


def check_attention(backend: CpuBackend, case: Case) -> None:
    stored = Stored(case, backend, None)
    out = stored.attend()
    exact, bound = stored.reference()
    assert np.isfinite(bound).all()
    worst = (np.abs(out - exact) / np.maximum(bound, 1e-300)).max()
    assert worst <= 1, f"{worst:.2f} times the allowed error"


@on_every_isa
@several
@given(case=cases(flush=True))
@example(case=ALONE)
@example(case=plain_case(prefix=0, remainder=0, suffix=0))
@example(case=plain_case(window=1, prefix=0))
def test_attention_equals_float64_on_the_stored_values(backend: CpuBackend, case: Case) -> None:
    count("decode attention", cells(case), case.tokens)
    check_attention(backend, case)


@on_every_isa
@several
@given(case=cases(families=FAMILIES[1:], flush=True))
@example(case=plain_case(formats="kivi", tiers=(Tier(2, 2),), remainder=100, flush=0))
@example(case=plain_case(formats="atom", tiers=(Tier(4, 4),), remainder=100, flush=24, window=60))
@example(case=plain_case(formats="kvquant", tiers=(Tier(3, 4),), remainder=100, flush=0, k_kind="outliers"))
@example(case=plain_case(formats="kvquant", tiers=(Tier(2, 3),), head_dim=256, chunk=256, group=17, v_kind="largest"))
def test_attention_over_published_formats_equals_float64(backend: CpuBackend, case: Case) -> None:
    check_attention(backend, case)


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
@given(case=cases(families=FAMILIES, flush=True))
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
        plain_case(), plain_case(tiers=(Tier(2, 4),), suffix=40, seed=2), plain_case(n_chunks=0, counts=((0,),)),
        plain_case(formats="kvquant", tiers=(Tier(4, 4),), prefix=11, remainder=70, flush=0),
        plain_case(formats="kivi", tiers=(Tier(2, 2),), remainder=70, flush=24))]
    alone = [stored.attend() for stored in batch]
    q, out = np.stack([stored.q for stored in batch]), np.full((5, alone[0].size), np.nan, np.float32)
    states, bound = np.stack([stored.state for stored in batch]), backend.bind_batch([stored.bound for stored in batch])
    backend.decode_attention(q, bound, states, out)
    assert out.tobytes() == np.stack(alone).tobytes()
    with pytest.raises(KernelError, match="2, 5 and 5 rows for a batch of 5"):
        backend.decode_attention(q[:2], bound, states, out)


@on_every_isa
def test_append_writes_one_slot_of_every_tail(backend: CpuBackend) -> None:
    batch = [Stored(plain_case(suffix=suffix), backend, None) for suffix in (9, 40, 23)]
    states, before = np.stack([stored.state for stored in batch]), [stored.arena.copy() for stored in batch]
    states[:, STATE_SLOT] -= [0, 3, 8]  # as good as any other slot
    G, D = batch[0].k.shape[0], batch[0].k.shape[2]
    k, v = np.random.default_rng(0).standard_normal((2, G, 3, D)).astype(np.float16)
    bound = backend.bind_batch([stored.bound for stored in batch])
    backend.append(k, v, bound, states)
    for b, (stored, expected) in enumerate(zip(batch, before, strict=True)):
        for rows, offset in ((k, stored.tail.k), (v, stored.tail.v)):
            shape = G, stored.tail.capacity, D
            tail = expected[offset : offset + 2 * int(np.prod(shape))].view(np.float16).reshape(shape)
            tail[:, states[b, STATE_SLOT]] = rows[:, b]
        assert stored.arena.tobytes() == expected.tobytes()
    states[1, STATE_SLOT] = batch[1].tail.capacity
    with pytest.raises(KernelError, match="append: an id, position or slot lies outside"):
        backend.append(k, v, bound, states)
    with pytest.raises(KernelError, match="one model"):
        backend.bind_batch([batch[0].bound, Stored(plain_case(n_kv_heads=1), backend, None).bound])


@on_every_isa
@pytest.mark.parametrize(("family", "tier"), [
    ("rotated", Tier(2, 2)), ("rotated", Tier(3, 4)), ("rotated", Tier(8, 8)), ("rotated", FP16), ("kivi", Tier(2, 4)),
    ("atom", Tier(4, 4)), ("kvquant", Tier(3, 4))], ids=str)
def test_the_bound_notices_one_missing_key(backend: CpuBackend, family: str, tier: Tier) -> None:
    stored = Stored(plain_case(formats=family, tiers=(tier,)), backend, None)
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
    poisoned_k, poisoned_v = k.copy(), v.copy()
    poisoned_k[:, :visible_from], poisoned_v[:, :visible_from] = np.nan, np.nan
    stored.pack(poisoned_k, poisoned_v)
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
    stored.state[1], stored.state[STATE_FLUSHED] = 0, 1
    with pytest.raises(KernelError, match="slot"):  # there is no room for flushed chunks
        stored.attend()
    stored.state[STATE_FLUSHED] = 0
    stored.q = stored.q[:, :32]
    with pytest.raises(KernelError, match="q must be"):
        stored.attend()


def test_what_the_tail_gave_up_is_read_from_the_flushed_span_alone() -> None:
    """NaN in the hidden slots of the tail, and chunks of the flushed span that the state does not count."""
    case = plain_case(formats="kivi", tiers=(Tier(4, 4),), remainder=100, flush=24, max_new=80, new=40)
    stored = Stored(case, BACKENDS[ISAS[-1]], None)
    expected, C = stored.attend(), case.layout.chunk
    half = 2 * case.layout.n_kv_heads * stored.tail.capacity * case.layout.head_dim
    for offset in (stored.tail.k, stored.tail.v):
        tail = stored.arena[offset : offset + half].view(np.float16).reshape(case.layout.n_kv_heads, -1, 64)
        tail[:, case.layout.prefix : case.layout.prefix + case.flushed * C] = np.nan
    assert 0 < case.flushed < stored.room.n
    assert stored.attend().tobytes() == expected.tobytes()
    for flushed in (-1, stored.room.n + 1):
        stored.state[STATE_FLUSHED] = flushed
        with pytest.raises(KernelError, match="slot"):
            stored.attend()


@pytest.mark.parametrize("family", ["atom", "kvquant"])
def test_formats_before_rope_refuse_tables_that_do_not_fit(family: str) -> None:
    stored = Stored(plain_case(formats=family, tiers=(Tier(4, 4),)), BACKENDS[ISAS[-1]], None)
    backend, layout, data = stored.backend, stored.case.layout, stored.uploaded
    span, tail = stored.spans[0], stored.tail
    k, v = backend.upload(stored.k), backend.upload(stored.v)

    def bind(data: Any, tail: Tail = tail) -> Any:
        return backend.bind(stored.arena, [span], tail, 6, 2, 64, 32, None, data=data)

    def pack(data: Any, positions: Any = None) -> Any:
        return backend.pack(k, v, stored.arena, span, stored.starts(0), 32, positions, data)

    for use in (bind, pack):
        for wrong, message in [(None, "need cos"), (replace(data, sin=None), "need sin"),
                               (replace(data, sin=data.sin[:50].copy()), "sin must be"),
                               *([(replace(data, k_levels=data.k_levels[:4].copy()), "k_levels must be"),
                                  (replace(data, v_levels=None), "need v_levels")] if family == "kvquant" else [])]:
            with pytest.raises(KernelError, match=message):
                use(wrong)
    room = np.int32(len(data.cos) - 32 - stored.starts(0).max())
    pack(data, stored.starts(0) + room)
    with pytest.raises(KernelError, match="begin at positions"):
        pack(data, stored.starts(0) + room + np.int32(1))
    # Chunks that do not lie a whole number of chunks behind the tail's head have no place in the turned tables.
    stored.bound = bind(data, replace(tail, head=layout.prefix + 1))
    with pytest.raises(KernelError, match="position"):
        stored.attend()
