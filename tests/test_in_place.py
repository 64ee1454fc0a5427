"""Mixed widths in place: the arena follows the document, holds the same codes, and attention reads the same values."""

from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from numpy_backend import NumpyBackend
from strategies import Case, cases, several

from runtime.arena import ALIGNMENT, ArenaLayout
from runtime.backend import load_backend
from runtime.cache import Cache
from runtime.errors import PlanError
from runtime.formats import block_bytes
from runtime.plan import FP16, HIDDEN, DocumentShape, Plan, Tier, runs


@cache
def cpu():
    return load_backend("cpu", threads=1)


def plan_of(case: Case) -> Plan:
    return Plan(case.layout, (case.assignment,), "test", "none", permutation=case.order)


def filled(backend, case: Case, plan: Plan) -> Cache:
    """The case's prompt packed under a plan, and the tokens decoded so far with the one that attends behind it."""
    layout = plan.layout
    config = SimpleNamespace(n_heads=case.heads, n_kv_heads=layout.n_kv_heads, head_dim=layout.head_dim,
                             sliding_window=layout.window)
    cache = Cache(backend, config, layout)
    cache.assign(plan)
    _, k, v = case.arrays()
    cache.pack(0, backend.upload(k), backend.upload(v))
    slot = layout.prompt_tokens - layout.n_chunks * layout.chunk
    for tail, values in ((cache.k[0], k), (cache.v[0], v)):
        tail[:, slot : slot + case.new + 1] = backend.upload(values[:, layout.prompt_tokens : case.tokens].copy())
    cache.state[:2] = backend.upload(np.array([case.tokens - 1, slot + case.new], np.int32))
    return cache


def attended(backend, case: Case, plan: Plan) -> np.ndarray:
    """(H * D,) of the case's query."""
    cache, q = filled(backend, case, plan), case.arrays()[0]
    out = backend.empty((1, q.size), np.float32)
    backend.decode_attention(backend.upload(q[None]), cache.bound[0], cache.state, out)
    return backend.download(out)[0]


@several
@given(case=cases())
def test_attention_equals_the_float64_reference_on_decoded_values(case: Case) -> None:
    plan = plan_of(case)
    expected = attended(NumpyBackend(), case, plan.without_reordering())
    np.testing.assert_allclose(attended(NumpyBackend(), case, plan), expected, rtol=1e-6, atol=1e-6)
    bound = 2e-3 * max(1e-6, float(np.abs(case.arrays()[2].astype(np.float64)).max()))
    np.testing.assert_allclose(attended(cpu(), case, plan.without_reordering()), expected, rtol=0, atol=bound)


@several
@given(case=cases())
def test_spans_are_the_runs_of_the_document_in_order(case: Case) -> None:
    """Every stored chunk once, codes and metadata of a run behind those of the run before, no part over another."""
    plan = plan_of(case).without_reordering()
    layout, sizes = plan.layout, ArenaLayout(plan.layout)
    spans, stored = sizes.spans(0), plan.stored(0)
    assert [chunk for chunks in stored for chunk in chunks] == list(range(layout.n_chunks))
    assert len(spans) == len(stored) == len(runs(case.assignment))
    parts, heads, padding = [], layout.n_kv_heads, 0
    for span, chunks in zip(spans, stored, strict=True):
        tier = layout.tiers[case.assignment[chunks[0]]]
        assert {case.assignment[chunk] for chunk in chunks} == {case.assignment[chunks[0]]}
        assert (span.n, span.k_bits, span.v_bits) == ((0, 0, 0) if tier == HIDDEN else
                                                      (len(chunks), tier.k_bits, tier.v_bits))
        if span.n:
            for kind, codes, meta, bits in (("K", span.k_codes, span.k_meta, span.k_bits),
                                            ("V", span.v_codes, span.v_meta, span.v_bits)):
                sizes_of = [heads * span.n * nbytes for nbytes in block_bytes(kind, bits, layout.chunk,
                                                                              layout.head_dim)]
                parts += [(kind, codes, sizes_of[0]), (kind, meta, sizes_of[1])]
                padding += 2 * ALIGNMENT
            parts.append(("position", span.positions, 4 * span.n))
    for kind in ("K", "V", "position"):
        begins = [begin for part, begin, _ in parts if part == kind]
        assert begins == sorted(begins)
    occupied = sorted((begin, begin + nbytes) for _, begin, nbytes in parts if nbytes)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(occupied))
    needed = sum(end - begin for begin, end in occupied)
    assert needed <= sizes.context_bytes <= needed + padding + ALIGNMENT


@several
@given(case=cases())
def test_a_chunk_has_the_same_codes_wherever_it_lies(case: Case) -> None:
    plan = plan_of(case)
    blocks = []
    for each in (plan, plan.without_reordering()):
        cache = filled(cpu(), case, each)
        arena, found = np.asarray(cache.arena), {}
        for span, chunks in zip(cache.spans[0], each.stored(0), strict=True):
            for i, chunk in enumerate(chunks if span.n else ()):
                k, v = (block_bytes(kind, bits, case.layout.chunk, case.layout.head_dim)
                        for kind, bits in (("K", span.k_bits), ("V", span.v_bits)))
                places = [(span.k_codes, span.k_codes_stride, k[0]), (span.k_meta, span.k_meta_stride, k[1]),
                          (span.v_codes, span.v_codes_stride, v[0]), (span.v_meta, span.v_meta_stride, v[1])]
                found[chunk] = [arena[at + g * stride + i * n :][:n].tobytes() for at, stride, n in places
                                for g in range(case.layout.n_kv_heads)]
                assert arena[span.positions + 4 * i :][:4].view(np.int32)[0] == case.layout.start(chunk)
        blocks.append(found)
    assert blocks[0] == blocks[1]


def test_a_plan_in_place_survives_json_and_says_so() -> None:
    shape = DocumentShape(n_layers=2, n_kv_heads=1, head_dim=8, chunk=8, n_chunks=4, prefix=0, remainder=0, suffix=1,
                          max_new=1, window=None)
    plan = Plan(shape.layout([FP16, Tier(2, 2)], [1, 3]), ((1, 0, 1, 1),) * 2, "test", "none", permutation=(3, 2, 1, 0))
    placed = plan.without_reordering()
    assert placed.stored(0) == ((0,), (1,), (2, 3)) and placed.assignment == plan.assignment
    assert Plan.from_json(placed.to_json()) == placed != plan
    assert "in place" in placed.table() and "in place" not in plan.table()
    assert placed.without_reordering() == placed


def test_what_contradicts_the_order_of_the_document_is_refused() -> None:
    shape = DocumentShape(n_layers=1, n_kv_heads=1, head_dim=8, chunk=8, n_chunks=3, prefix=0, remainder=0, suffix=1,
                          max_new=1, window=None)
    placed = Plan(shape.layout([FP16, Tier(2, 2)], [1, 2]), ((0, 1, 1),), "test", "none").without_reordering()
    with pytest.raises(PlanError, match="in place, with another assignment"):
        Plan(placed.layout, ((1, 0, 1),), "test", "none")
    with pytest.raises(PlanError, match="expected no permutation"):
        Plan(placed.layout, placed.assignment, "test", "none", permutation=(0, 1, 2))
    with pytest.raises(PlanError, match=r"in_place of layer 0 has \(2, 1\) chunks per tier; the layout expects"):
        type(placed.layout)(**{**vars(placed.layout), "in_place": ((0, 0, 1),)})
