"""Policies: the paper's thresholds and its pitfalls; a budget that is never exceeded, well spent, and monotone."""

import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cocktail.policies import Policy, default_query, load_policy
from cocktail.policies.budget import DEFAULT_TIERS, parse_bytes
from cocktail.policies.path import SpendingPath
from cocktail.scorers import load_scorer
from runtime.arena import ArenaLayout
from runtime.errors import PlanError
from runtime.plan import FP16, HIDDEN, DocumentShape, Plan, Tier

INT2, INT4 = Tier(2, 2), Tier(4, 4)


def shape_of(n: int, *, window: int | None = None, chunk: int = 32, head_dim: int = 64, heads: int = 3,
             layers: int = 2) -> DocumentShape:
    return DocumentShape(n_layers=layers, n_kv_heads=heads, head_dim=head_dim, chunk=chunk, n_chunks=n, prefix=5,
                         remainder=3, suffix=20, max_new=64, window=window)


def tiers_of(plan: Plan) -> list[Tier]:
    """Tier per chunk; the same in every layer."""
    assert len(set(plan.assignment)) == 1
    return [plan.layout.tiers[tier] for tier in plan.assignment[0]]


def bits_per_value(plan: Plan) -> Fraction:
    """Counted here from the arena and the plan, not by the policy."""
    layout = plan.layout
    stored = sum(tier != HIDDEN for tier in tiers_of(plan))
    values = 2 * layout.n_layers * layout.n_kv_heads * layout.head_dim * layout.chunk * stored
    return Fraction(8 * ArenaLayout(layout).context_bytes, values or 1)


def cocktail(scores: list[float], **options: float) -> list[Tier]:
    policy = load_policy("cocktail", **{"sink": 0, **options})
    return tiers_of(policy.plan(shape_of(len(scores)), np.array(scores, np.float32), "test"))


SHAPES = st.builds(shape_of, st.integers(0, 60), window=st.none() | st.integers(1, 2000),
                   chunk=st.sampled_from([8, 32, 40]), head_dim=st.sampled_from([4, 64, 96]), heads=st.integers(1, 3),
                   layers=st.integers(1, 2))
SINKS = st.integers(0, 3)


@st.composite
def scored_shapes(draw: st.DrawFn) -> tuple[DocumentShape, np.ndarray]:
    shape = draw(SHAPES)
    scores = draw(st.lists(st.sampled_from([0.0, 0.5, -1.0]) | st.floats(-1, 1, width=32), min_size=shape.n_chunks,
                           max_size=shape.n_chunks))
    return shape, np.array(scores, np.float32)


# All policies.

@settings(deadline=None)
@given(scored=scored_shapes(), sink=SINKS)
@pytest.mark.parametrize("name", ["fp16", "cocktail", "budget"])
def test_sink_is_fp16_and_only_hidden_chunks_are_not_stored(name: str, scored: tuple[DocumentShape, np.ndarray],
                                                            sink: int) -> None:
    shape, scores = scored
    policy = load_policy(name, **({} if name == "fp16" else {"sink": sink}))
    plan = policy.plan(shape, scores, "test")
    assert plan.policy == name and plan.scorer == "test"
    for chunk, tier in enumerate(tiers_of(plan)):
        assert (tier == HIDDEN) == (chunk in shape.hidden_chunks())
        assert tier in (FP16, HIDDEN) or (chunk >= sink and name != "fp16")
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", ["budget", "cocktail", "uniform"])
@pytest.mark.parametrize("window", [None, 100])
def test_behind_a_chat_header_no_chunk_is_the_sink(name: str, window: int | None) -> None:
    for prefix, sink in ((0, 1), (3, 1), (4, 0), (30, 0)):
        shape, scores = replace(shape_of(12, window=window), prefix=prefix), np.arange(12, dtype=np.float32)
        policies = [load_policy(name, **({"tier": "K4V2"} if name == "uniform" else {}), **options)
                    for options in ({}, {"sink": sink})]
        assert policies[0].plan(shape, scores) == policies[1].plan(shape, scores)


@settings(deadline=None)
@given(scored=scored_shapes())
@pytest.mark.parametrize("name", ["cocktail", "budget"])
def test_higher_scores_never_get_fewer_bits(name: str, scored: tuple[DocumentShape, np.ndarray]) -> None:
    shape, scores = scored
    plan = load_policy(name, sink=0).plan(shape, scores)
    stored = [(score, tier.k_bits, tier.v_bits) for score, tier in zip(scores, tiers_of(plan), strict=True)
              if tier != HIDDEN]
    for (a, *fewer), (b, *more) in zip(sorted(stored), sorted(stored)[1:], strict=False):
        assert a == b or all(x <= y for x, y in zip(fewer, more, strict=True))


@pytest.mark.parametrize("name", ["fp16", "cocktail", "budget"])
def test_layout_needs_scores_only_where_said(name: str) -> None:
    policy, shape, scores = load_policy(name), shape_of(9), np.arange(9, dtype=np.float32)
    if policy.layout_needs_scores:
        with pytest.raises(PlanError, match="needs one score per chunk"):
            policy.layout(shape)
    else:
        assert policy.layout(shape) == policy.layout(shape, scores)
    if policy.uses_scores:
        with pytest.raises(PlanError, match="needs one score per chunk"):
            policy.assign(policy.layout(shape, scores))
        with pytest.raises(PlanError, match=r"shape \(8,\); expected \(9,\)"):
            policy.plan(shape, scores[:8])
    else:
        assert tiers_of(policy.plan(shape)) == [FP16] * 9


@pytest.mark.parametrize(("name", "options", "message"), [
    ("best", {}, "no policy 'best'; expected one of fp16, uniform, kvtuner, kivi, atom, kvquant, cocktail, budget"),
    ("fp16", {"sink": 1}, "no option sink"),
    ("budget", {"alpha": 0.5}, "no option alpha"), ("cocktail", {"kv_bits": 3.3}, "no option kv_bits"),
    ("budget", {"sink": -1}, "sink"), ("cocktail", {"sink": True}, "sink"),
])
def test_unknown_policy_or_option_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load_policy(name, **options)


def test_no_whole_chunk_is_all_fp16() -> None:
    for name in ("fp16", "cocktail", "budget"):
        plan = load_policy(name).plan(shape_of(0))
        assert plan.layout.tiers == (FP16,) and plan.layout.counts == ((0,), (0,)) and plan.assignment == ((), ())


@pytest.mark.parametrize("name", ["cocktail", "budget"])
def test_nan_scores_count_as_the_lowest(name: str) -> None:
    scores = np.linspace(1, 0, 20, dtype=np.float32)
    broken = scores.copy()
    broken[[3, 7]] = np.nan, np.inf
    scores[[3, 7]] = 0
    policy = load_policy(name)
    with pytest.warns(UserWarning, match="2 of 20 scores were not finite"):
        plan = policy.plan(shape_of(20), broken)
    assert plan == policy.plan(shape_of(20), scores)


@pytest.mark.parametrize(("instruction", "expected"), [("Summarise.", "Summarise."), (None, "end"), ("  ", "end")])
def test_without_a_query_the_instruction_else_the_end_is_used(instruction: str | None, expected: str) -> None:
    assert default_query(instruction, "end") == expected


# The paper's thresholds.

def test_thresholds_are_equations_2_and_3() -> None:
    # s_min 0, s_max 1: T_low = .6, T_high = .9
    assert cocktail([0.0, 0.59, 0.61, 0.89, 0.91, 1.0]) == [INT2, INT2, INT4, INT4, FP16, FP16]
    assert cocktail([-3.0, 1.0, 2.0, -1.0], alpha=0.5, beta=0.3) == [INT2, FP16, FP16, INT2]


def test_inequalities_are_strict() -> None:
    assert cocktail([0.0, 0.5, 0.75, 1.0], alpha=0.5, beta=0.25) == [INT2, INT4, INT4, FP16]
    assert cocktail([0.0, 0.5, 1.0], alpha=0, beta=0) == [INT4, INT4, INT4]


@pytest.mark.parametrize("scores", [[0.3], [0.3, 0.3, 0.3], [0.0] * 4])
def test_one_chunk_or_equal_scores_give_int4_throughout(scores: list[float]) -> None:
    assert cocktail(scores) == [INT4] * len(scores)
    assert cocktail(scores, sink=1) == [FP16] + [INT4] * (len(scores) - 1)


def test_all_scores_nan_give_int4_throughout() -> None:
    with pytest.warns(UserWarning, match="3 of 3"):
        assert cocktail([float("nan")] * 3) == [INT4] * 3


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.4), (0.9, 0.9), (1.0, 0.0), (0.7, 0.3), (0.1, 0.9)])
def test_alpha_plus_beta_of_one_or_more_is_refused(alpha: float, beta: float) -> None:
    with pytest.raises(PlanError, match=r"alpha \+ beta is .* expected less than 1"):
        load_policy("cocktail", alpha=alpha, beta=beta)


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"beta": float("nan")}, {"alpha": float("inf")}])
def test_alpha_and_beta_must_be_numbers(options: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="expected a number from 0 to 1"):
        load_policy("cocktail", **options)


def test_nan_moves_no_threshold() -> None:
    with pytest.warns(UserWarning):
        assert cocktail([0.0, 0.65, 1.0, float("nan")]) == [*cocktail([0.0, 0.65, 1.0]), INT2]


def test_hidden_chunks_move_no_threshold() -> None:
    shape = shape_of(6, window=2 * 32 + 23)  # the last two chunks, remainder and suffix are visible
    assert list(shape.hidden_chunks()) == [0, 1, 2, 3]
    plan = load_policy("cocktail", sink=0).plan(shape, np.array([9, 9, 9, -9, 0, 1], np.float32))
    assert tiers_of(plan) == [HIDDEN] * 4 + [INT2, FP16]


def test_other_scores_than_the_layouts_are_refused() -> None:
    policy = load_policy("cocktail")
    layout = policy.layout(shape_of(4), np.array([0, 0, 0, 1], np.float32))
    with pytest.raises(PlanError):
        policy.assign(layout, np.array([0, 0.7, 1, 1], np.float32))


# The byte budget.

def budget(**options: object) -> Policy:
    return load_policy("budget", **options)


LADDER = tuple(map(Tier.parse, ("K2V2", "K3V2", "K4V2", "K4V3", "K4V4", "K8V4", "K8V8", "FP16")))
BITS = st.floats(2, 20) | st.sampled_from([3.0, 3.3, 16.0])


@settings(deadline=None)
@given(scored=scored_shapes(), bits=BITS, sink=SINKS)
@example(scored=(shape_of(1, chunk=40, head_dim=4, heads=2, layers=1), np.zeros(1, np.float32)), bits=2, sink=0)  # 9.6
def test_bits_are_never_exceeded(scored: tuple[DocumentShape, np.ndarray], bits: float, sink: int) -> None:
    shape, scores = scored
    try:
        plan = budget(kv_bits=bits, sink=sink).plan(shape, scores)
    except PlanError as error:
        assert "expected at least" in str(error)
        least = float(str(error).split("expected at least ")[1].split(",")[0])
        assert least > bits  # and the named minimum is one
        assert bits_per_value(budget(kv_bits=least, sink=sink).plan(shape, scores)) <= Fraction(str(least))
    else:
        assert bits_per_value(plan) <= Fraction(str(bits))


@settings(deadline=None)
@given(scored=scored_shapes(), nbytes=st.integers(1, 3_000_000), sink=SINKS)
def test_bytes_of_the_whole_arena_are_never_exceeded(scored: tuple[DocumentShape, np.ndarray], nbytes: int,
                                                     sink: int) -> None:
    shape, scores = scored
    try:
        plan = budget(kv_budget=nbytes, sink=sink).plan(shape, scores)
    except PlanError as error:
        least = int(str(error).split("expected at least ")[1].split(", which")[0].replace(",", ""))
        assert least > nbytes
        assert ArenaLayout(budget(kv_budget=least, sink=sink).plan(shape, scores).layout).nbytes <= least
    else:
        assert ArenaLayout(plan.layout).nbytes <= nbytes


@settings(deadline=None)
@given(shape=SHAPES, bits=BITS, sink=SINKS)
@example(shape=shape_of(50), bits=3.3, sink=1)
def test_what_is_left_of_the_budget_is_less_than_one_upgrade(shape: DocumentShape, bits: float, sink: int) -> None:
    """Some single upgrade of one chunk to the next tier no longer fits; FP16 throughout needs none."""
    try:
        plan = budget(kv_bits=bits, sink=sink).plan(shape, np.zeros(shape.n_chunks, np.float32))
    except PlanError:
        return
    tiers = tiers_of(plan)
    if all(tier in (FP16, HIDDEN) for tier in tiers):
        return
    upgraded, path = [], SpendingPath(shape, 1, DEFAULT_TIERS)
    chain = [next(iter(+path.counts(step)[0])) for step in range(path.steps + 1)]
    assert chain[0] == INT2 and chain[-1] == FP16
    for i, tier in enumerate(tiers):
        if tier not in (FP16, HIDDEN):
            better = [*tiers[:i], chain[chain.index(tier) + 1], *tiers[i + 1:]]
            counts = {t: better.count(t) for t in better}
            upgraded.append(ArenaLayout(shape.layout(counts.keys(), counts.values())).context_bytes)
    values = 8 * ArenaLayout(plan.layout).context_bytes / bits_per_value(plan)
    assert max(upgraded) * 8 > Fraction(str(bits)) * values


@settings(deadline=None)
@given(scored=scored_shapes(), bits=st.tuples(BITS, BITS).map(sorted), sink=SINKS,
       tiers=st.none() | st.sets(st.sampled_from(LADDER), min_size=1).map(lambda t: sorted(t, key=LADDER.index)))
@example(scored=(shape_of(30, chunk=8, head_dim=4), np.zeros(30, np.float32)), bits=[5.0, 5.5], sink=0, tiers=None)
def test_more_budget_never_takes_bits_from_a_chunk(scored: tuple[DocumentShape, np.ndarray], bits: list[float],
                                                   sink: int, tiers: list[Tier] | None) -> None:
    shape, scores = scored
    try:
        less, more = (budget(kv_bits=b, sink=sink, tiers=tiers).plan(shape, scores) for b in bits)
    except PlanError:
        return
    for a, b in zip(tiers_of(less), tiers_of(more), strict=True):
        assert a.k_bits <= b.k_bits and a.v_bits <= b.v_bits


def test_large_budget_is_fp16_throughout_and_the_minimum_is_k2v2() -> None:
    shape, scores = shape_of(40), np.arange(40, dtype=np.float32)
    assert tiers_of(budget(kv_bits=20).plan(shape, scores)) == [FP16] * 40
    for sink, where in ((0, "throughout"), (1, "for all but 1 sink chunks")):
        with pytest.raises(PlanError, match=f"K2V2 {where}") as error:
            budget(kv_bits=2, sink=sink).plan(shape, scores)
        least = float(str(error.value).split("expected at least ")[1].split(",")[0])
        found = tiers_of(budget(kv_bits=least, sink=sink).plan(shape, scores))
        assert found == [FP16] * sink + [INT2] * (40 - sink)


@pytest.mark.parametrize(("bits", "low", "middle", "high"), [
    (3.3, Tier(3, 2), (0.2, 0.3), (0.015, 0.035)), (3.8, Tier(4, 3), (0.45, 0.65), (0.03, 0.05)),
])
def test_usual_budgets_give_the_measured_mixes(bits: float, low: Tier, middle: tuple[float, float],
                                               high: tuple[float, float]) -> None:
    n = 500
    plan = budget(kv_bits=bits).plan(shape_of(n), np.arange(n, dtype=np.float32))
    assert bits - 0.02 < bits_per_value(plan) <= Fraction(str(bits))
    tiers = tiers_of(plan)
    assert max(set(tiers), key=tiers.count) == low
    assert middle[0] <= tiers.count(Tier(4, 3)) / n <= middle[1]
    assert high[0] <= tiers.count(Tier(8, 4)) / n <= high[1]


def test_equal_scores_prefer_earlier_chunks() -> None:
    tiers = tiers_of(budget(kv_bits=4).plan(shape_of(50), load_scorer("none").score([""] * 50, "")))
    assert [tier.k_bits for tier in tiers] == sorted((tier.k_bits for tier in tiers), reverse=True)


def test_hidden_chunks_cost_nothing() -> None:
    """The same visible chunks get the same widths whether or not hidden ones precede them."""
    far, near = shape_of(100, window=40 * 32 + 23), shape_of(40, window=40 * 32 + 23)
    assert (len(far.hidden_chunks()), len(near.hidden_chunks())) == (60, 0)
    scores = load_scorer("random").score([""] * 100, "")
    bits = 3.4
    tiers = tiers_of(budget(kv_bits=bits, sink=0).plan(far, scores))
    assert tiers[:60] == [HIDDEN] * 60
    assert tiers[60:] == tiers_of(budget(kv_bits=bits, sink=0).plan(near, scores[60:]))


def test_default_is_3_3_bits_and_never_less_than_the_measured_mix() -> None:
    long, short, sunk = (budget(sink=sink).plan(shape_of(n), np.arange(n, dtype=np.float32))
                         for n, sink in ((1000, None), (20, None), (20, 1)))
    assert 3.29 < bits_per_value(long) <= Fraction("3.3") and long.notes == ()
    assert bits_per_value(short) <= Fraction("3.3") and INT2 not in tiers_of(short) and short.notes == ()
    assert tiers_of(sunk).count(Tier(3, 2)) == 14 and tiers_of(sunk).count(INT2) == 1
    assert len(sunk.notes) == 1 and re.match(r"3\.7[0-9] bits per value, above the usual 3\.3", sunk.notes[0])


def test_tiers_left_out_send_their_chunks_one_higher() -> None:
    shape, scores = shape_of(200), np.arange(200, dtype=np.float32)
    used = {name: set(tiers_of(budget(kv_bits=3.6, tiers=name, sink=0).plan(shape, scores)))
            for name in ("K3V2,K4V4,K8V8", "K2V2,K4V4,FP16", "K2V2,FP16")}
    assert used == {name: {Tier.parse(tier) for tier in name.split(",")} for name in used}


def test_fixed_shares() -> None:
    policy = budget(tiers="K3V2,K4V4,K8V8", shares=(0.1, 0.03), sink=1)
    tiers = tiers_of(policy.plan(shape_of(101), np.arange(101, dtype=np.float32)))
    assert tiers == [FP16] + [Tier(3, 2)] * 87 + [Tier(4, 4)] * 10 + [Tier(8, 8)] * 3
    policy = budget(tiers="K2V3,K4V8", shares="0.5", sink=0)  # any tiers, since no budget must order them
    assert tiers_of(policy.plan(shape_of(4), np.arange(4, dtype=np.float32))) == [Tier(2, 3)] * 2 + [Tier(4, 8)] * 2


@pytest.mark.parametrize(("options", "message"), [
    ({"kv_bits": 3.3, "kv_budget": 10**9}, "kv_bits and kv_budget each fix the bytes"),
    ({"kv_bits": 3.3, "shares": (0.1,), "tiers": "K2V2,K4V4"}, "kv_bits and shares each fix"),
    ({"kv_bits": float("nan")}, "kv_bits is nan"), ({"kv_bits": -1}, "kv_bits is -1"),
    ({"kv_budget": "lots"}, "kv_budget is 'lots'"), ({"kv_budget": -5}, "kv_budget is -5"),
    ({"tiers": "K4V4,K2V2"}, "low to high"), ({"tiers": "K4V2,K2V4"}, "low to high"), ({"tiers": ""}, "tier ''"),
    ({"tiers": ()}, "low to high"), ({"tiers": "K4V4,K4V4"}, "low to high"), ({"tiers": "K0V0,K4V4"}, "width 0"),
    ({"shares": (0.1,)}, "shares but no tiers"), ({"tiers": "K2V2,K4V4", "shares": (0.1, 0.2)}, "2 shares for 2 tiers"),
    ({"tiers": "K2V2,K4V4", "shares": (1.1,)}, "sum of at most 1"), ({"tiers": "K2V2,K4V4", "shares": "a"}, "numbers"),
    ({"tiers": "K2V2,K4V4", "shares": (float("nan"),)}, "numbers from 0 to 1"),
])
def test_invalid_budget_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        budget(**options)


@pytest.mark.parametrize(("text", "expected"), [
    (200, 200), ("200", 200), ("1.5KiB", 1536), ("200MiB", 200 * 2**20), ("200 MB", 200 * 10**6), ("2gib", 2**31),
    ("7B", 7), ("0.1kB", 100),
])
def test_bytes_are_parsed(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "1e9", "-1", "5iB", "5 Mi", "٣MiB", "1,000", "inf"])
def test_other_byte_texts_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="expected bytes"):
        parse_bytes(text)
