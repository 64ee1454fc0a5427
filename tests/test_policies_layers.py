"""Policies with widths per layer: uniform, kvtuner, pairs as a floor under cocktail, losses under budget; ablations."""

import json
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_policies import BITS, SHAPES, SINKS, scored_shapes, shape_of, tiers_of

from cocktail.policies import load_policy
from cocktail.policies.budget import DEFAULT_TIERS
from cocktail.policies.pairs import LOSS_WIDTHS, LayerLosses, LayerPairs
from cocktail.policies.path import STEEPNESS, SpendingPath
from runtime.arena import ArenaLayout
from runtime.errors import PlanError
from runtime.formats import block_bytes
from runtime.plan import FP16, HIDDEN, DocumentShape, Plan, Tier

WIDTHS = st.sampled_from([2, 3, 4, 8, 16])
PAIRS = st.builds(Tier, WIDTHS, WIDTHS)
LOWEST = Tier(2, 2)


def pairs_of(*pairs: Tier, **model: object) -> LayerPairs:
    return LayerPairs(tuple(pairs), model, "test.json")


@st.composite
def layered(draw: st.DrawFn) -> tuple[DocumentShape, np.ndarray, LayerPairs]:
    """A shape, its scores, and a pair for each of its layers."""
    shape, scores = draw(scored_shapes())
    return shape, scores, pairs_of(*draw(st.lists(PAIRS, min_size=shape.n_layers, max_size=shape.n_layers)))


def tiers_in(plan: Plan, layer: int) -> list[Tier]:
    return [plan.layout.tiers[tier] for tier in plan.assignment[layer]]


def join(a: Tier, b: Tier) -> Tier:
    return a if HIDDEN in (a, b) else Tier(max(a.k_bits, b.k_bits), max(a.v_bits, b.v_bits))


def bits_per_value(plan: Plan) -> Fraction:
    """Counted from the arena and the plan, not by the policy."""
    layout = plan.layout
    stored = sum(tier != HIDDEN for layer in range(layout.n_layers) for tier in tiers_in(plan, layer))
    values = 2 * layout.n_kv_heads * layout.head_dim * layout.chunk * stored
    return Fraction(8 * ArenaLayout(layout).context_bytes, values or 1)


# One tier everywhere, one pair per layer.

@settings(deadline=None)
@given(shape=SHAPES, tier=PAIRS, sink=SINKS)
def test_uniform_is_one_tier_behind_the_sink(shape: DocumentShape, tier: Tier, sink: int) -> None:
    for option in (tier, str(tier), str(tier).lower()):
        plan = load_policy("uniform", tier=option, sink=sink).plan(shape)
        hidden = len(shape.hidden_chunks())
        kept = max(0, min(sink, shape.n_chunks) - hidden)
        assert tiers_of(plan) == [HIDDEN] * hidden + [FP16] * kept + [tier] * (shape.n_chunks - hidden - kept)
        assert plan.policy == "uniform" and plan.scores is None
        assert Plan.from_json(plan.to_json()) == plan


@settings(deadline=None)
@given(case=layered(), sink=SINKS)
def test_kvtuner_is_every_layers_own_pair_behind_the_sink(case: tuple[DocumentShape, np.ndarray, LayerPairs],
                                                          sink: int) -> None:
    shape, _, pairs = case
    plan = load_policy("kvtuner", pairs=pairs, sink=sink).plan(shape)
    for layer, pair in enumerate(pairs.pairs):
        assert tiers_in(plan, layer) == tiers_of(load_policy("uniform", tier=pair, sink=sink).plan(shape))
    assert Plan.from_json(plan.to_json()) == plan


@settings(deadline=None)
@given(case=layered())
def test_kvtuners_bytes_are_the_sum_over_its_layers(case: tuple[DocumentShape, np.ndarray, LayerPairs]) -> None:
    """To within the 64-byte boundaries, of which a layer of one format and the sink has at most twelve."""
    shape, _, pairs = case
    plan = load_policy("kvtuner", pairs=pairs, sink=0).plan(shape)
    stored = shape.n_chunks - len(shape.hidden_chunks())
    exact = sum(stored * (4 + shape.n_kv_heads * sum(block_bytes("K", pair.k_bits, shape.chunk, shape.head_dim)
                                                     + block_bytes("V", pair.v_bits, shape.chunk, shape.head_dim)))
                for pair in pairs.pairs)
    assert exact <= ArenaLayout(plan.layout).context_bytes < exact + shape.n_layers * 12 * 64


@pytest.mark.parametrize(("name", "options", "message"), [
    ("uniform", {}, "policy uniform needs a tier"), ("uniform", {"tier": "INT4"}, "of the form K3V2"),
    ("uniform", {"tier": "K0V0"}, "stores nothing"), ("uniform", {"tier": "K5V5"}, "k_bits is 5"),
    ("uniform", {"tier": "K4V4", "sink": -1}, "sink"), ("kvtuner", {}, "policy kvtuner needs pairs"),
    ("kvtuner", {"pairs_bits": 3.0}, "needs pairs"), ("budget", {"pairs_bits": 3.0}, "no option pairs_bits"),
    ("cocktail", {"pairs_bits": 3.0}, "no pairs file"), ("budget", {"no_search": True}, "no option no_search"),
    ("uniform", {"tier": "K4V4", "pairs": "x"}, "no option pairs"),
])
def test_invalid_options_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load_policy(name, **options)


# Pairs as a floor.

@settings(deadline=None)
@given(case=layered(), sink=SINKS)
def test_cocktail_on_pairs_lifts_its_own_tiers_to_each_layers_pair(case: tuple[DocumentShape, np.ndarray, LayerPairs],
                                                                   sink: int) -> None:
    shape, scores, pairs = case
    plain = tiers_of(load_policy("cocktail", sink=sink).plan(shape, scores))
    plan = load_policy("cocktail", sink=sink, pairs=pairs).plan(shape, scores)
    for layer, pair in enumerate(pairs.pairs):
        assert tiers_in(plan, layer) == [join(tier, pair) for tier in plain]
    assert plan.policy == "cocktail (pairs)"
    assert Plan.from_json(plan.to_json()) == plan


@settings(deadline=None)
@given(scored=scored_shapes(), sink=SINKS)
def test_pairs_of_the_lowest_tier_change_nothing(scored: tuple[DocumentShape, np.ndarray], sink: int) -> None:
    shape, scores = scored
    plain = load_policy("cocktail", sink=sink).plan(shape, scores)
    floored = load_policy("cocktail", sink=sink, pairs=pairs_of(*[LOWEST] * shape.n_layers)).plan(shape, scores)
    assert tiers_of(floored) == tiers_of(plain)


# What each layer loses.

LOSS = st.sampled_from([0.0, 1e-9]) | st.floats(1e-8, 1)
ROWS = st.fixed_dictionaries(dict.fromkeys(LOSS_WIDTHS, LOSS))  # more bits may seem to lose more


def losses_of(k: list[dict[int, float]], v: list[dict[int, float]]) -> LayerLosses:
    return LayerLosses(*({width: tuple(row[width] for row in side) for width in LOSS_WIDTHS} for side in (k, v)),
                       {}, "test.json")


@st.composite
def lossy(draw: st.DrawFn) -> tuple[DocumentShape, np.ndarray, LayerLosses]:
    """A shape, its scores, and what each of its layers loses."""
    shape, scores = draw(scored_shapes())
    return shape, scores, losses_of(*(draw(st.lists(ROWS, min_size=shape.n_layers, max_size=shape.n_layers))
                                      for _ in "KV"))


@settings(deadline=None)
@given(case=lossy(), bits=BITS, sink=SINKS)
def test_a_budget_is_kept_whatever_the_layers_lose(case: tuple[DocumentShape, np.ndarray, LayerLosses], bits: float,
                                                   sink: int) -> None:
    shape, scores, losses = case
    policy = load_policy("budget", kv_bits=bits, sink=sink, pairs=losses)
    try:
        plan = policy.plan(shape, scores)
    except PlanError as error:
        least = float(str(error).split("expected at least ")[1].split(",")[0])
        assert least > bits
        bits, policy = least, load_policy("budget", kv_bits=least, sink=sink, pairs=losses)
        plan = policy.plan(shape, scores)
    assert bits_per_value(plan) <= Fraction(str(bits))
    for layer in range(shape.n_layers):
        for chunk, tier in enumerate(tiers_in(plan, layer)):
            assert (tier == HIDDEN) == (chunk in shape.hidden_chunks())
            assert tier in (FP16, HIDDEN) or chunk >= sink
    assert policy.layout(shape) == policy.layout(shape, scores)  # no score changes the bytes
    assert plan.policy == "budget (pairs)"
    assert Plan.from_json(plan.to_json()) == plan


@settings(deadline=None)
@given(case=lossy(), nbytes=st.integers(1, 3_000_000))
def test_bytes_of_the_whole_arena_are_kept_whatever_the_layers_lose(
        case: tuple[DocumentShape, np.ndarray, LayerLosses], nbytes: int) -> None:
    shape, scores, losses = case
    try:
        plan = load_policy("budget", kv_budget=nbytes, pairs=losses).plan(shape, scores)
    except PlanError as error:
        least = int(str(error).split("expected at least ")[1].split(", which")[0].replace(",", ""))
        assert least > nbytes
        plan = load_policy("budget", kv_budget=least, pairs=losses).plan(shape, scores)
        nbytes = least
    assert ArenaLayout(plan.layout).nbytes <= nbytes


@settings(deadline=None)
@given(case=lossy(), bits=st.tuples(BITS, BITS).map(sorted))
def test_more_budget_takes_bits_from_no_chunk_of_any_layer(case: tuple[DocumentShape, np.ndarray, LayerLosses],
                                                           bits: list[float]) -> None:
    shape, scores, losses = case
    try:
        less, more = (load_policy("budget", kv_bits=b, pairs=losses).plan(shape, scores) for b in bits)
    except PlanError:
        return
    for layer in range(shape.n_layers):
        for a, b in zip(tiers_in(less, layer), tiers_in(more, layer), strict=True):
            assert join(a, b) == b


@settings(deadline=None)
@given(case=lossy(), bits=BITS, sink=SINKS, factor=st.floats(1, 1000))
def test_who_loses_more_never_gets_fewer_bits(case: tuple[DocumentShape, np.ndarray, LayerLosses], bits: float,
                                              sink: int, factor: float) -> None:
    """Neither the chunk of the higher score in any layer, nor the layer that loses `factor` times as much as another
    at every width. Losses too small to be told from none are left out of the second."""
    shape, scores, losses = case
    k, v = ({width: tuple(row[0] * factor**layer for layer in range(shape.n_layers)) for width, row in side.items()}
            for side in (losses.k, losses.v))
    proportional = LayerLosses(k, v, {}, "test.json")
    first = max(sink, len(shape.hidden_chunks()))
    for given_losses in (losses, proportional):
        try:
            plan = load_policy("budget", kv_bits=bits, sink=sink, pairs=given_losses).plan(shape, scores)
        except PlanError:
            return
        for layer in range(shape.n_layers):
            ranked = sorted(zip(scores[first:], map(str, tiers_in(plan, layer)[first:]), strict=True))
            for (a, less), (b, more) in pairwise(ranked):
                assert a == b or join(Tier.parse(less), Tier.parse(more)) == Tier.parse(more)
    if min(min(k[width][0], v[width][0]) for width in LOSS_WIDTHS) < 1e-8:
        return
    for layer in range(shape.n_layers - 1):
        for less, more in zip(tiers_in(plan, layer), tiers_in(plan, layer + 1), strict=True):
            assert join(less, more) == more or factor == 1


@settings(deadline=None)
@given(case=lossy(), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_nothing_of_as_many_bytes_loses_less(case: tuple[DocumentShape, np.ndarray, LayerLosses], share: float,
                                             seed: int) -> None:
    """Any first steps against chunks at random tiers, whose best ranks take the most bits: what all of them lose by
    the weights of their ranks. (Where words that codes do not fill make a wider tier as small, a step may be free.)"""
    shape, _, losses = case
    for sizes in ([block_total(shape, Tier(bits, 2)) for bits in (2, 3, 4, 8, 16)],
                  [block_total(shape, Tier(2, bits)) for bits in (2, 3, 4, 8, 16)]):
        assume(sizes == sorted(set(sizes)))
    ranked, rng = shape.n_chunks, np.random.default_rng(seed)
    path = SpendingPath(shape, ranked, DEFAULT_TIERS, losses)
    steps = int(share * path.steps)
    nbytes = np.array([block_total(shape, tier) for tier in DEFAULT_TIERS])
    loss = np.array([losses.of(DEFAULT_TIERS, layer) for layer in range(shape.n_layers)])
    weights = (np.arange(ranked) + 0.5) ** -STEEPNESS

    def lost(chosen: np.ndarray) -> float:
        return float((np.take_along_axis(loss, chosen, 1) * weights).sum())

    best = np.array([[DEFAULT_TIERS.index(tier) for tier in sorted(
        counts.elements(), key=lambda tier: -tier.k_bits - tier.v_bits)] for counts in path.counts(steps)], np.int64)
    best = best.reshape(shape.n_layers, ranked)
    assert nbytes[best].sum() == path.spent[steps]
    for _ in range(20):
        other = rng.integers(len(DEFAULT_TIERS), size=best.shape)
        cheaper = rng.random(best.shape) < rng.random()
        other[cheaper] = np.minimum(other, best)[cheaper]
        if nbytes[other].sum() <= path.spent[steps]:
            assert lost(best) <= lost(other) * (1 + 1e-9) + 1e-9


def block_total(shape: DocumentShape, tier: Tier) -> int:
    """Bytes of one chunk in one layer with its position, before alignment."""
    return 4 + shape.n_kv_heads * sum(sum(block_bytes(kind, bits, shape.chunk, shape.head_dim))
                                      for kind, bits in (("K", tier.k_bits), ("V", tier.v_bits)))


# The file.

def write(folder: Path, **data: object) -> Path:
    path = folder / "pairs.json"
    path.write_text(json.dumps(data))
    return path


PARETO = [{"bits": 2.8, "kl": 0.3, "pairs": ["K2V2", "K3V2"]}, {"bits": 3.6, "kl": 0.1, "pairs": ["K4V2", "K3V2"]},
          {"bits": 4.7, "kl": 0.01, "pairs": ["K4V4", "K4V4"]}]


def test_a_file_gives_its_choice_or_the_best_that_a_number_of_bits_buys(tmp_path: Path) -> None:
    path = write(tmp_path, version=1, pairs=["K8V4", "fp16"], pareto=PARETO)
    assert LayerPairs.load(path).pairs == (Tier(8, 4), FP16)
    assert LayerPairs.load(path, 3.6).pairs == LayerPairs.load(str(path), 4.0).pairs == (Tier(4, 2), Tier(3, 2))
    plan = load_policy("kvtuner", pairs=path, pairs_bits=3).plan(shape_of(9))
    assert [tiers_in(plan, layer)[-1] for layer in (0, 1)] == [LOWEST, Tier(3, 2)]
    with pytest.raises(PlanError, match=r"no trade-off of at most 2\.5 bits; its least is 2\.800"):
        LayerPairs.load(path, 2.5)
    with pytest.raises(PlanError, match="chosen already"):
        load_policy("kvtuner", pairs=LayerPairs.load(path), pairs_bits=3)


@pytest.mark.parametrize(("data", "message"), [
    ({}, '"version" is None; expected 1'), ({"version": True, "pairs": ["K2V2"]}, '"version" is True'),
    ({"version": 1}, '"pairs" is not a list'), ({"version": 1, "pairs": []}, '"pairs" is not a list'),
    ({"version": 1, "pairs": [4]}, '"pairs" is not a list'), ({"version": 1, "pairs": ["K5V2"]}, "k_bits is 5"),
    ({"version": 1, "pairs": ["K0V0"]}, "stores nothing"), ({"version": 1, "pairs": ["K2V2"], "model": 3}, '"model"'),
])
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, data: dict[str, object], message: str) -> None:
    path = write(tmp_path, **data)
    with pytest.raises(PlanError, match="pairs.json.*" + message):
        load_policy("kvtuner", pairs=path)


@pytest.mark.parametrize("pareto", [None, {}, [3], [{"bits": 3, "kl": "x", "pairs": []}], [{"bits": 3, "kl": 1}],
                                    [{"bits": float("nan"), "kl": 1, "pairs": ["K2V2"]}]])
def test_a_broken_list_of_trade_offs_is_refused(tmp_path: Path, pareto: object) -> None:
    path = write(tmp_path, version=1, pairs=["K2V2"], pareto=pareto)
    with pytest.raises(PlanError, match='"pareto" is not a list of trade-offs'):
        LayerPairs.load(path, 3)


LOSSES = {side: {str(width): [0.1, 0.2] for width in LOSS_WIDTHS} for side in "KV"}


def test_a_file_of_losses_is_read_and_is_for_so_many_layers(tmp_path: Path) -> None:
    path = write(tmp_path, version=1, pairs=["K2V2"], losses=LOSSES | {"V": {str(w): [w, 0] for w in LOSS_WIDTHS}})
    losses = LayerLosses.load(path)
    assert losses.k[3] == (0.1, 0.2) and losses.v[4] == (4.0, 0.0)
    np.testing.assert_allclose(losses.of([Tier(2, 4), Tier(16, 3), FP16], 0), [4.1, 3, 0])
    scores = np.zeros(9, np.float32)
    assert load_policy("budget", kv_bits=4, pairs=str(path)).plan(shape_of(9), scores)
    with pytest.raises(PlanError, match=r"pairs\.json is for 2 layers; the model has 3 layers"):
        load_policy("budget", kv_bits=4, pairs=path).plan(shape_of(9, layers=3), scores)
    other = write(tmp_path, version=1, losses=LOSSES, model={"head_dim": 128})
    with pytest.raises(PlanError, match="whose head_dim is 128; this one's is 64"):
        load_policy("budget", kv_bits=4, pairs=other).layout(shape_of(9))


@pytest.mark.parametrize(("losses", "message"), [
    (None, 'has no "losses", which policy budget goes by'), ({"K": LOSSES["K"]}, '"losses" has no "V" with the widths'),
    (3, 'has no "K"'), (LOSSES | {"K": {"2": [1]}}, 'has no "K" with the widths 2, 3, 4, 8'),
    (LOSSES | {"V": LOSSES["V"] | {"16": [0, 0]}}, 'has no "V" with'),
    (LOSSES | {"V": LOSSES["V"] | {"2": [0.1]}}, "of V are for different numbers of layers"),
    *((LOSSES | {"K": LOSSES["K"] | {"3": row}}, "of K are not lists of nats")
      for row in ([-1, 0], ["a", 0], [float("nan"), 0], [True, 0], [], 3)),
])
def test_losses_that_are_none_are_refused_by_name(tmp_path: Path, losses: object, message: str) -> None:
    path = write(tmp_path, version=1, pairs=["K2V2", "K2V2"], **({} if losses is None else {"losses": losses}))
    with pytest.raises(PlanError, match="pairs.json.*" + message):
        load_policy("budget", pairs=path)


def test_a_file_that_is_missing_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json: No such file"):
        load_policy("kvtuner", pairs=tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PlanError, match=r"broken\.json is not valid JSON"):
        load_policy("budget", pairs=str(tmp_path / "broken.json"))


@pytest.mark.parametrize("name", ["kvtuner", "cocktail"])
def test_pairs_of_another_model_are_refused(name: str) -> None:
    shape, scores = shape_of(5), np.zeros(5, np.float32)
    with pytest.raises(PlanError, match=r"test\.json is for 3 layers; the model has 2 layers"):
        load_policy(name, pairs=pairs_of(*[LOWEST] * 3)).plan(shape, scores)
    with pytest.raises(PlanError, match="whose head_dim is 128; this one's is 64"):
        load_policy(name, pairs=pairs_of(*[LOWEST] * 2, n_layers=2, head_dim=128)).plan(shape, scores)


# The ablations of Table V.

@settings(deadline=None)
@given(scored=scored_shapes(), sink=SINKS, seed=st.integers(0, 5))
def test_without_search_the_proportions_stay_and_the_chunks_are_random(scored: tuple[DocumentShape, np.ndarray],
                                                                       sink: int, seed: int) -> None:
    shape, scores = scored
    plain = load_policy("cocktail", sink=sink).plan(shape, scores)
    drawn = load_policy("cocktail", sink=sink, no_search=True, seed=seed).plan(shape, scores)
    assert Counter(tiers_of(drawn)) == Counter(tiers_of(plain))
    assert ArenaLayout(drawn.layout).nbytes == ArenaLayout(plain.layout).nbytes
    assert drawn.scores == plain.scores and drawn.policy == "cocktail (no search)"
    fixed = max(sink, len(shape.hidden_chunks()))
    assert tiers_of(drawn)[:fixed] == tiers_of(plain)[:fixed]
    assert load_policy("cocktail", sink=sink, no_search=True, seed=seed).plan(shape, scores) == drawn


def test_without_search_the_score_does_not_help_a_chunk() -> None:
    """Over many seeds every chunk behind the sink is FP16 about as often as any other."""
    shape, scores = shape_of(11), np.arange(11, dtype=np.float32)
    found = np.zeros(11)
    for seed in range(400):
        plan = load_policy("cocktail", no_search=True, seed=seed, sink=1).plan(shape, scores)
        found += [tier == FP16 for tier in tiers_of(plan)]
    assert found[0] == 400 and found[1:].sum() == 400
    assert found[1:].min() > 15 and found[1:].max() < 75  # 40 expected, with a deviation of 6


@settings(deadline=None)
@given(case=layered(), sink=SINKS, no_search=st.booleans())
def test_without_reordering_the_widths_stay_and_the_document_is_the_order(
        case: tuple[DocumentShape, np.ndarray, LayerPairs], sink: int, no_search: bool) -> None:
    shape, scores, pairs = case
    options = {"sink": sink, "pairs": pairs, "no_search": no_search}
    plain = load_policy("cocktail", **options).plan(shape, scores)
    placed = load_policy("cocktail", **options, no_reorder=True).plan(shape, scores)
    assert placed.assignment == plain.assignment == placed.layout.in_place
    assert placed.policy == f"cocktail (pairs, {'no search, ' if no_search else ''}no reorder)"
    stored = [chunk for chunks in placed.stored(0) for chunk in chunks]
    assert stored == list(range(shape.n_chunks))
    policy = load_policy("cocktail", **options, no_reorder=True)
    assert policy.layout(shape, scores) == placed.layout  # the arena is sized before the chunks are assigned
