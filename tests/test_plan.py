"""Plans: a valid one survives JSON exactly, an invalid one is refused with PlanError and nothing else."""

import json
import re
from contextlib import suppress
from dataclasses import FrozenInstanceError, fields, replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plans import plans

from runtime.arena import ALIGNMENT, ArenaLayout
from runtime.backend import Span
from runtime.errors import PlanError
from runtime.formats import block_bytes
from runtime.plan import FP16, HIDDEN, CalibrationFile, DocumentShape, Layout, Plan, Tier, hidden_chunks


def small(**changes: object) -> Plan:
    shape = DocumentShape(n_layers=3, n_kv_heads=2, head_dim=64, chunk=32, n_chunks=4, prefix=5, remainder=3, suffix=7,
                          max_new=10, window=None)
    layout = shape.layout((FP16, Tier(4, 4), Tier(3, 2)), (1, 1, 2))
    return replace(Plan(layout, ((0, 2, 1, 2),) * 3, "budget", "bm25", (0.5, 0.25, 1.0, -3.0)), **changes)


# Valid plans.

def test_bits_per_value_count_no_chunk_that_a_window_hides() -> None:
    """On neither side: 16 bits and the chunks' positions, whatever share of the document is hidden."""
    shape = DocumentShape(n_layers=3, n_kv_heads=2, head_dim=64, chunk=32, n_chunks=8, prefix=5, remainder=3, suffix=7,
                          max_new=10, window=140)
    hidden = len(shape.hidden_chunks())
    assert 0 < hidden < 8
    sizes = ArenaLayout(shape.layout((FP16, HIDDEN), (8 - hidden, hidden)))
    assert 16 <= sizes.context_bits_per_value <= 16.1
    assert ArenaLayout(shape.layout((FP16, HIDDEN), (0, 8))).context_bits_per_value == 16


@settings(deadline=None)
@given(plans())
def test_json_round_trip_is_exact(plan: Plan) -> None:
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text


@settings(deadline=None)
@given(plans())
def test_order_lists_every_chunk_of_a_tier_once(plan: Plan) -> None:
    for layer, assignment in enumerate(plan.assignment):
        orders = [plan.order(layer, tier) for tier in range(len(plan.layout.tiers))]
        assert [len(order) for order in orders] == list(plan.layout.counts[layer])
        assert all(assignment[chunk] == tier for tier, order in enumerate(orders) for chunk in order)
        if plan.permutation is None:
            assert all(list(order) == sorted(order) for order in orders)
        else:
            assert all(list(order) == sorted(order, key=plan.permutation.index) for order in orders)


def test_equal_layers_are_stored_once() -> None:
    chunks = 4096
    shape = replace(small().layout, n_layers=32, n_chunks=chunks, counts=((chunks, 0, 0),) * 32)
    plan = Plan(shape, tuple(tuple([0] * chunks) for _ in range(32)), "p", "s")
    assert len({id(layer) for layer in plan.assignment}) == 1
    assert len(plan.to_json()) < chunks + 1000
    again = Plan.from_json(plan.to_json())
    assert len({id(layer) for layer in again.assignment}) == 1


def test_table_shows_counts_widths_and_shares() -> None:
    rows = [line.split() for line in small().table().splitlines()]
    assert ["K3V2", "3", "2", "2", "50.0%"] in rows
    assert ["FP16", "16", "16", "1", "25.0%"] in rows


@settings(deadline=None)
@given(plans())
def test_table_counts_match_the_assignment(plan: Plan) -> None:
    used = {tier for layer in plan.assignment for tier in layer}
    assert len(plan.table().splitlines()) == 2 + len(used) + len(plan.notes)


@settings(deadline=None)
@given(plans())
def test_every_part_has_its_own_place_and_nothing_else_takes_any(plan: Plan) -> None:
    """Of regions, positions, tails and flushed chunks; but for what brings each part to its boundary."""
    layout, sizes, parts = plan.layout, ArenaLayout(plan.layout), []
    padded = 0  # parts that may be followed by padding
    for layer in range(layout.n_layers):
        spans, flushed = sizes.spans(layer), sizes.flushed(layer)
        room = 0 if layout.flush is None else max(
            0, layout.remainder + layout.suffix + layout.max_new - layout.flush) // layout.chunk
        assert (flushed.n if flushed else 0) == room
        assert [span.n for span in spans] == [n if tier != HIDDEN else 0 for tier, n in zip(
            layout.tiers, layout.counts[layer], strict=True)]
        for span in (*spans, *([flushed] if flushed else [])):
            assert span.formats == layout.formats
            if span.n:
                parts += owned(layout, span)
                padded += 7
        tail, rows = sizes.tail(layer), 2 * layout.n_kv_heads * layout.head_dim * layout.tail_capacity
        parts += [(tail.k, rows), (tail.v, rows)]
        padded += 2
    parts.append((sizes.tail_positions, 4 * layout.tail_capacity))
    occupied = sorted(part for part in parts if part[1])
    for (begin, nbytes), (following, _) in pairwise([*occupied, (sizes.nbytes, 0)]):
        assert begin + nbytes <= following
    assert sizes.nbytes - sum(nbytes for _, nbytes in occupied) <= (padded + 1) * (ALIGNMENT - 1)
    assert layout.head_dim % 2 or all(begin % 4 == 0 for begin, _ in occupied)


def owned(layout: Layout, span: Span) -> list[tuple[int, int]]:
    """(offset, bytes) of everything of a span."""
    k, v = (block_bytes(kind, bits, layout.chunk, layout.head_dim, layout.formats)
            for kind, bits in (("K", span.k_bits), ("V", span.v_bits)))
    found = [(span.positions, 4 * span.n), (span.v_shared, v.shared * span.n)]
    for g in range(layout.n_kv_heads):
        found += [(offset + g * stride, nbytes * span.n) for offset, stride, nbytes in (
            (span.k_codes, span.k_codes_stride, k.codes), (span.k_meta, span.k_meta_stride, k.meta),
            (span.v_codes, span.v_codes_stride, v.codes), (span.v_meta, span.v_meta_stride, v.meta))]
    return found


@settings(deadline=None)
@given(plans(), st.data())
def test_part_of_a_span_is_its_chunks(plan: Plan, data: st.DataObject) -> None:
    sizes = ArenaLayout(plan.layout)
    spans = [span for span in (*sizes.spans(0), sizes.flushed(0)) if span is not None and span.n]
    if not spans:
        return
    span = data.draw(st.sampled_from(spans))
    first = data.draw(st.integers(0, span.n - 1))
    n = data.draw(st.integers(1, span.n - first))
    whole, part = owned(plan.layout, span), owned(plan.layout, sizes.part(span, first, n))
    for (begin, nbytes), (at, taken) in zip(whole, part, strict=True):
        if nbytes:
            assert (at - begin, taken) == (nbytes // span.n * first, nbytes // span.n * n)


@pytest.mark.parametrize(("flush", "expected"), [(None, [0, 0, 0]), (0, [0, 0, 1]), (9, [0, 0, 0]), (1000, [0, 0, 0])])
def test_the_tail_gives_up_what_is_behind_its_window(flush: int | None, expected: list[int]) -> None:
    layout = replace(small().layout, flush=flush, max_new=100)
    assert [layout.flushed(generated) for generated in (0, 21, 22)] == expected  # 3 + 7 + 22 is one chunk
    if flush == 9:
        assert [layout.flushed(generated) for generated in (30, 31, 62, 63)] == [0, 1, 1, 2]


@pytest.mark.parametrize(("changes", "message"), [
    ({"formats": "nf4"}, "formats is 'nf4'; expected one of rotated, kivi, atom, kvquant"),
    ({"formats": "atom"}, "there is no K3V2 in the atom formats; their widths are 4 and 16"),
    ({"formats": "kvquant", "tiers": (FP16, Tier(8, 4), Tier(3, 2))}, "there is no K8V4 in the kvquant formats"),
    ({"flush": -1}, "flush is -1"), ({"flush": True}, "flush is True"),
    ({"flush": 8, "tiers": (FP16,), "counts": ((4,),) * 3}, "flush needs a tier below FP16"),
    ({"calibration": CalibrationFile("a", "b")}, "the rotated formats read no calibration"),
])
def test_formats_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(small().layout, **changes)


def test_a_flushed_tail_may_begin_with_chunks_of_the_context() -> None:
    layout = replace(small().layout, flush=8, remainder=3 + 32, n_chunks=3, counts=((1, 1, 1),) * 3)
    assert layout.context_tokens == small().layout.context_tokens
    with pytest.raises(PlanError, match="less than one chunk"):
        replace(layout, flush=None)


def test_token_counts() -> None:
    layout = small().layout
    assert layout.prompt_tokens == 5 + 4 * 32 + 3 + 7
    assert layout.tail_capacity == 5 + 3 + 7 + 10
    assert layout.start(2) == 5 + 2 * 32


@pytest.mark.parametrize("tier", [Tier(3, 2), FP16, HIDDEN, Tier(2, 16)])
def test_tier_parses_its_own_name(tier: Tier) -> None:
    assert Tier.parse(str(tier)) == tier
    assert Tier.parse(f"k{tier.k_bits}v{tier.v_bits}") == tier


@settings(deadline=None)
@given(prefix=st.integers(0, 50), chunk=st.sampled_from([8, 16, 32]), n=st.integers(0, 20), rest=st.integers(0, 60),
       window=st.none() | st.integers(1, 400))
@example(prefix=0, chunk=8, n=1, rest=0, window=1)  # only the token itself is visible
@example(prefix=0, chunk=8, n=1, rest=0, window=2)  # the chunk's last token is one behind the first decoded one
def test_hidden_chunks_are_those_no_decoded_token_sees(prefix: int, chunk: int, n: int, rest: int,
                                                       window: int | None) -> None:
    prompt = prefix + n * chunk + rest
    expected = [i for i in range(n) if window is not None
                and not any(0 <= prompt - key < window for key in range(prefix + i * chunk, prefix + (i + 1) * chunk))]
    assert list(hidden_chunks(prefix, chunk, n, prompt, window)) == expected


# Invalid values.

@pytest.mark.parametrize("bits", [(0, 2), (2, 0), (1, 2), (5, 5), (32, 32), (True, 2), (2.0, 2), ("2", 2), (-2, 2)])
def test_invalid_tier_is_refused(bits: tuple[object, object]) -> None:
    with pytest.raises(PlanError, match="tier"):
        Tier(*bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "K3", "K3V", "3V2", "K3V2 ", "K٣V2", "K99V99", "FP8", "K-3V2"])
def test_invalid_tier_name_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="tier"):
        Tier.parse(text)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("chunk", 12, "chunk is 12; expected a multiple of 8"), ("chunk", 0, "chunk"), ("chunk", 264, "chunk"),
    ("remainder", 32, "less than one chunk"), ("n_layers", 0, "n_layers"), ("n_layers", 4, "expected 4"),
    ("n_kv_heads", True, "n_kv_heads"), ("prefix", -1, "prefix"), ("window", 0, "window"), ("window", 1.5, "window"),
    ("n_chunks", 5, "sum to 4; expected n_chunks = 5"), ("max_new", 2**31, "max_new"), ("suffix", 2**31 - 1, "prompt"),
    ("tiers", (FP16,), "has 3 counts; expected 1"), ("tiers", (), "at least one"), ("tiers", [FP16], "tuple of Tier"),
    ("tiers", (FP16, FP16, Tier(4, 4)), "named once"), ("counts", ((1, 1, 2),), "1 layers; expected 3"),
    ("counts", ((1, -1, 4),) * 3, "count of K4V4 in layer 0 is -1"), ("counts", ((1, True, 2),) * 3, "integers"),
])
def test_invalid_layout_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(small().layout, **{field: value})


@pytest.mark.parametrize(("changes", "message"), [
    ({"assignment": ((0, 2, 1, 1),) * 3}, r"\(1, 2, 1\) chunks per tier; the layout expects \(1, 1, 2\)"),
    ({"assignment": ((0, 2, 1, 2),) * 2}, "2 layers; expected 3"),
    ({"assignment": ((0, 2, 1),) * 3}, "3 entries; expected 4"),
    ({"assignment": ((0, 2, 1, 3),) * 3}, "is 3; expected an integer from 0 to 2"),
    ({"assignment": ((0, 2, True, 2),) * 3}, "expected integers"),
    ({"assignment": [[0, 2, 1, 2]] * 3}, "one tuple per layer"),
    ({"scores": (1.0,)}, "1 scores; expected 4"),
    ({"scores": (float("nan"), 0.0, 0.0, 0.0)}, "score of chunk 0"),
    ({"scores": (0.0, 0.0, 0.0, 1)}, "score of chunk 3 is 1; expected a finite float"),
    ({"permutation": (0, 1, 2, 2)}, "twice"), ({"permutation": (0, 1, 2)}, "3 entries; expected 4"),
    ({"policy": "two\nlines"}, "printable"), ({"scorer": "\x1b[2J"}, "printable"),
    ({"notes": ("\ud800",)}, "printable"), ({"layout": None}, "expected a Layout"),
])
def test_invalid_plan_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        small(**changes)


def test_plan_is_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        small().policy = "other"  # type: ignore[misc]


def test_check_names_what_differs() -> None:
    small().layout.check(n_layers=3, window=None)
    with pytest.raises(PlanError, match="n_layers is 3, expected 32; window is None, expected 4096"):
        small().layout.check(n_layers=32, n_kv_heads=2, window=4096)


# Hostile JSON.

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
                    max_leaves=8)
FIELDS = [f.name for f in fields(DocumentShape)]


@pytest.mark.parametrize("text", ["", "[]", "null", "1", "{}", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\ud800",
                                  '{"version":1,"version":1}', '{"version":true}', '{"version":2}', '{"version":1}'])
def test_json_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


@settings(deadline=None)
@given(key=st.sampled_from([*json.loads(small().to_json()), *FIELDS]), value=JSON)
@example(key="scores", value=[1e999, 0.0, 0.0, 0.0])
@example(key="scores", value=[10**400, 0, 0, 0])
@example(key="layers", value=[0, 0, -1])  # must not index from the end
@example(key="n_layers", value=10**12)  # must not allocate
@example(key="n_chunks", value=2**31 - 1)
@example(key="assignments", value=["0²12"])
@example(key="tiers", value=[["FP16"], {}, "K3V2"])
@example(key="notes", value="text")
def test_replaced_value_gives_a_plan_or_plan_error(key: str, value: object) -> None:
    data = json.loads(small().to_json())
    (data["shape"] if key in FIELDS else data)[key] = value
    try:
        plan = Plan.from_json(json.dumps(data))
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("path", [*((key,) for key in json.loads(small().to_json())), *(("shape", f) for f in FIELDS)])
def test_missing_and_extra_fields_are_refused(path: tuple[str, ...]) -> None:
    data = json.loads(small().to_json())
    inner = data["shape"] if len(path) == 2 else data
    value = inner.pop(path[-1])
    with pytest.raises(PlanError, match=f"lacks.*{path[-1]}" if path != ("version",) else "version"):
        Plan.from_json(json.dumps(data))
    inner[path[-1]] = value
    inner["surprise"] = 1
    with pytest.raises(PlanError, match="surprise"):
        Plan.from_json(json.dumps(data))


def test_a_field_that_appears_twice_is_refused() -> None:
    text = small().to_json()
    with pytest.raises(PlanError, match="a field appears twice"):
        Plan.from_json(text[:-1] + ',"policy":"other"}')


def test_a_number_too_long_to_print_is_refused_without_being_printed() -> None:
    with pytest.raises(PlanError, match="n_layers is a huge number"):
        replace(small().layout, n_layers=10**5000)


@settings(deadline=None)
@given(data=st.data())
def test_mutated_text_gives_a_plan_or_plan_error(data: st.DataObject) -> None:
    text = small().to_json()
    at, n = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 20))
    with suppress(PlanError):
        Plan.from_json(text[:at] + data.draw(st.text(max_size=5)) + text[at + n:])


@pytest.mark.parametrize(("change", "message"), [
    ({"assignments": ["0112", "0x12"], "layers": [0, 1, 1]},
     "chunk 1 in assignment 1 (layer 1) is at 'x'; expected one of 0 (K3V2), 1 (K4V4), 2 (FP16)"),
    ({"assignments": ["011"], "layers": [0, 0, 0]},
     "assignment 0 (layer 0) has 3 chunks; expected 4, one digit for each"),
    ({"assignments": ["0112"], "layers": [0, 0]}, "plan layers has 2 entries; expected 3"),
    ({"assignments": ["0112"], "layers": [0, 0, 1]}, "an entry of plan layers is 1; expected an integer from 0 to 0"),
    ({"tiers": ["K3V2", "K4V5", "FP16"]}, "tier v_bits is 5; expected one of 0, 2, 3, 4, 8, 16"),
    ({"tiers": ["K3V2", "K3V2", "FP16"]}, "layout tiers are (K3V2, K3V2, FP16); expected at least one"),
])
def test_a_slip_of_whoever_edits_a_plan_is_named(change: dict[str, object], message: str) -> None:
    plan = small()
    data = json.loads(plan.to_json()) | {"tiers": ["K3V2", "K4V4", "FP16"]} | change
    with pytest.raises(PlanError, match=re.escape(message)):
        Plan.from_json(json.dumps(data))


def test_integers_are_read_as_scores() -> None:
    """A tool that rewrites JSON may turn 1.0 into 1."""
    data = json.loads(small().to_json())
    data["scores"] = [1, 0, 2, 3]
    assert Plan.from_json(json.dumps(data)).scores == (1.0, 0.0, 2.0, 3.0)
