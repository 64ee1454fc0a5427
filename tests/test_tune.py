"""The search for pairs: what they cost against an oracle, fronts and clusters, the study, and the command line."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_backend import NumpyBackend
from tiny_model import HANDBOOK

from cocktail import tune
from cocktail.model import Model
from cocktail.policies import load_policy
from cocktail.policies.pairs import LayerPairs
from cocktail.tuning import calibration as calibration_module
from cocktail.tuning import profile as tune_profile
from cocktail.tuning import report
from cocktail.tuning.calibration import Calibration, Prompt, calibrate, prompts_of_text, read_prompts
from cocktail.tuning.profile import profile
from cocktail.tuning.search import Found, Search, front
from cocktail.tuning.space import CANDIDATES, Space, build_space, pair_bits, pareto, parse_candidates
from cocktail.verify import log_softmax
from runtime.arena import ArenaLayout
from runtime.checkpoint import Checkpoint
from runtime.errors import PromptError, TuneError
from runtime.model import Model as Engine
from runtime.plan import FP16, Tier
from runtime.weights import load_weights

PROMPTS = [Prompt(HANDBOOK[:1500], "Who mended the pan?"),
           Prompt(HANDBOOK[2000:3800], "Repeat.", "A ferry crosses the river.")]
TIERS = tuple(map(Tier.parse, ("K2V2", "K4V2", "K4V4", "K8V8")))
BITS = {tier: pair_bits(tier, 32, 16) for tier in TIERS}


@pytest.fixture(scope="module")
def calibration(model: Model) -> Calibration:
    return calibrate(model, PROMPTS, answer_tokens=8)


# What it costs.

@pytest.mark.parametrize("pairs", [("K2V2", "K8V8"), ("K4V2", "K2V4"), ("FP16", "FP16")])
def test_the_cost_is_the_kl_that_a_document_shows(model: Model, calibration: Calibration,
                                                  pairs: tuple[str, str]) -> None:
    chosen, found = LayerPairs(tuple(map(Tier.parse, pairs)), {}, "test"), []
    for prompt, sample in zip(PROMPTS, calibration.samples, strict=True):
        doc = model.read(prompt.context)
        if prompt.answer is None:
            assert sample.answer == doc.ask(prompt.query, policy="fp16", max_tokens=8).ids
        p, q = (log_softmax(doc.logits(prompt.query, sample.answer, policy=policy)[1:])
                for policy in (load_policy("fp16"), load_policy("kvtuner", pairs=chosen)))
        found.append((np.exp(p) * (p - q)).sum(axis=1))
    assert calibration.kl(chosen.pairs) == pytest.approx(np.concatenate(found).mean(), rel=1e-3, abs=1e-6)
    assert (calibration.kl(chosen.pairs) > 1e-5) == (pairs[0] != "FP16")


def test_what_was_calibrated_on_is_described(calibration: Calibration) -> None:
    shapes = [sample.shape for sample in calibration.samples]
    assert calibration.described == {
        "prompts": 2, "sink": None, "chunk": 32, "context_tokens": 32 * sum(shape.n_chunks for shape in shapes),
        "answer_tokens": sum(len(sample.answer) - 1 for sample in calibration.samples)}


def oracles(path: Path, model: Model, calibration: Calibration) -> Calibration:
    """The same answers through attention in float64 over decoded values."""
    with Checkpoint.open(path) as checkpoint:
        engine = Engine(checkpoint.config, load_weights(checkpoint, NumpyBackend()), NumpyBackend())
    prompts = [replace(prompt, answer=model.tokenizer.decode(sample.answer, skip_special=False))
               for prompt, sample in zip(PROMPTS, calibration.samples, strict=True)]
    oracle = calibrate(Model(engine, model.tokenizer, model.template), prompts, answer_tokens=8)
    assert [sample.answer for sample in oracle.samples] == [sample.answer for sample in calibration.samples]
    return oracle


def test_the_cost_is_the_oracles(path: Path, model: Model, calibration: Calibration, monkeypatch) -> None:
    """A token at a time."""
    tried = ([Tier(2, 16), FP16], [FP16, Tier(16, 3)], [Tier(4, 2), Tier(2, 4)])
    found = [calibration.kl(pairs) for pairs in tried]
    assert min(found) > 1e-6 and abs(calibration.kl([FP16, FP16])) < 1e-7
    monkeypatch.setattr(calibration_module, "force", lambda reading, answer, cache: reading.force(answer, cache))
    oracle = oracles(path, model, calibration)
    assert found == pytest.approx([oracle.kl(pairs) for pairs in tried], rel=0.05, abs=1e-6)


def test_errors_of_attention_outputs_are_the_oracles(path: Path, model: Model, calibration: Calibration) -> None:
    """FP16 costs nothing, bits never hurt much."""
    candidates = (*TIERS, FP16)
    errors = profile(calibration, candidates)
    assert errors.shape == (2, 5)
    np.testing.assert_allclose(errors, profile(oracles(path, model, calibration), candidates), rtol=0.02, atol=1e-6)
    assert (errors[:, -1] == 0).all() and (errors[:, :-1] > 0).all()
    assert (errors[:, 0] > 3 * errors[:, 3]).all()


# Fronts and clusters.

NUMBERS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(points=NUMBERS)
def test_a_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    costs, errors = zip(*points, strict=True)
    found = pareto(costs, errors)
    kept = [points[i] for i in found]
    assert len(set(kept)) == len(kept) == len(found) and kept == sorted(kept)
    for point in points:
        beaten = any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
        assert (point in kept) == (not beaten)


def test_layers_with_the_same_front_and_like_errors_share_a_choice() -> None:
    errors = np.array([[4, 2, 1, 0.1], [4.2, 2.1, 0.9, 0.1], [40, 20, 10, 1], [4, 5, 1, 0.1], [4.1, 6, 1, 0.11]])
    space = build_space(TIERS, errors, 32, 64, similar=1.25)
    assert space.clusters == ((0, 1), (2,), (3, 4))
    assert space.choices == (TIERS, TIERS, (TIERS[0], *TIERS[2:]))
    assert space.size == 48 and space.pairs(TIERS[:3]) == (TIERS[0], TIERS[0], TIERS[1], TIERS[2], TIERS[2])
    assert build_space(TIERS, errors, 32, 64, similar=20).clusters == ((0, 1, 2), (3, 4))


def test_bits_of_a_pair_are_those_of_its_arena(model: Model) -> None:
    """To within positions (4 bytes a chunk) and alignment (a few boundaries of 64 bytes a layer)."""
    shape = model.read(HANDBOOK[:9000]).shape("Who?", 8)
    for tier in parse_candidates(CANDIDATES):
        sizes = ArenaLayout(load_policy("uniform", tier=tier, sink=0).plan(shape).layout)
        values = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * shape.chunk * shape.n_chunks
        room = 8 * shape.n_layers * (4 * shape.n_chunks + 12 * 64) / values
        assert 0 <= sizes.context_bits_per_value - pair_bits(tier, shape.chunk, shape.head_dim) < room


# The search, with a made-up cost: each layer's own weight times what its pair loses.

def made_space(weights: Sequence[float]) -> Space:
    errors = np.array([[weight * 2.0 ** -BITS[tier] for tier in TIERS] for weight in weights])
    return build_space(TIERS, errors, 32, 16, similar=1.01)


class Cost:
    """Counts what is measured; raises in place of measurement `stop`."""

    def __init__(self, weights: Sequence[float], stop: int | None = None):
        self.weights, self.stop, self.measured = weights, stop, Counter()

    def __call__(self, pairs: Sequence[Tier]) -> float:
        if sum(self.measured.values()) == self.stop:
            raise KeyboardInterrupt
        self.measured[tuple(pairs)] += 1
        return sum(weight * 2.0 ** -BITS[pair] for weight, pair in zip(self.weights, pairs, strict=True))


FEW, MANY = (1.0, 8.0, 3.0), tuple(1.7**i for i in range(9))


def test_a_small_space_is_searched_to_the_end(tmp_path: Path) -> None:
    space, cost = made_space(FEW), Cost(FEW)
    study = Search(tmp_path / "a.study", {}, population=8)
    study.run(space, cost, trials=1000, max_bits=100)
    everything = [Found(pairs, space.mean_bits(pairs), Cost(FEW)(pairs)) for pairs in product(TIERS, repeat=3)]
    assert sorted(map(str, study.found())) == sorted(map(str, everything))
    assert set(cost.measured.values()) == {1}


def test_the_cap_holds_and_an_impossible_one_is_refused(tmp_path: Path) -> None:
    space, cost = made_space(FEW), Cost(FEW)
    study = Search(tmp_path / "a.study", {}, population=8)
    cap = space.mean_bits([TIERS[1]] * 3)
    study.run(space, cost, trials=1000, max_bits=cap)
    allowed = {pairs for pairs in product(TIERS, repeat=3) if space.mean_bits(pairs) <= cap}
    assert set(cost.measured) <= allowed and len(cost.measured) > len(allowed) / 2
    with pytest.raises(TuneError, match=r"the cap is 2 bits; expected at least 2\.[0-9]+"):
        study.run(space, cost, trials=2000, max_bits=2)


@settings(deadline=None)
@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=8), cap=st.floats(2.8, 9), count=st.integers(1, 9))
def test_a_search_begins_under_its_cap_with_what_the_profile_says(weights: list[float], cap: float, count: int) -> None:
    space = made_space(weights)
    begun = space.beginnings(count, cap)
    assert begun[0] == tuple(choices[0] for choices in space.choices) and len(set(begun)) == len(begun)
    assert all(space.mean_bits(space.pairs(chosen)) <= cap for chosen in begun)
    assert len(begun) <= len(TIERS) + count
    path = begun[sum(BITS[tier] <= cap for tier in TIERS):]
    for less, more in pairwise(path):
        assert all(BITS[a] <= BITS[b] for a, b in zip(less, more, strict=True))


def test_the_search_improves_on_where_it_begins(tmp_path: Path) -> None:
    """A profile that misleads it, since its last layer matters most: evolution has to find out."""
    space = made_space([1.0 + 0.1 * i for i in range(8)] + [0.5])
    cost = Cost([1.0] * 8 + [200.0])
    study = Search(tmp_path / "a.study", {}, population=12)
    study.run(space, cost, trials=160, max_bits=6)
    assert len(study.found()) == 160
    first = [Found(pairs, space.mean_bits(pairs), cost(pairs)) for pairs in map(space.pairs, space.beginnings(6, 6))]
    at = 4.5
    def best(found: list[Found]) -> float:
        return min(each.kl for each in found if each.bits <= at)
    assert best(study.found()) < 0.5 * best(first)
    assert best(front(study.found(), 6)) == best(study.found())


@pytest.mark.parametrize("stop", [0, 3, 25])
def test_an_interrupted_search_goes_on_and_measures_nothing_twice(tmp_path: Path, stop: int) -> None:
    space, broken = made_space(MANY), Cost(MANY, stop)
    with pytest.raises(KeyboardInterrupt):
        study = Search(tmp_path / "a.study", {"model": "a"}, population=8)
        study.even(space, broken)
        study.run(space, broken, trials=40, max_bits=100)
    study, cost = Search(tmp_path / "a.study", {"model": "a"}, population=8), Cost(MANY)
    assert {each.pairs for each in study.found()} >= set(broken.measured)
    assert [each.pairs for each in study.even(space, cost)] == [(tier,) * 9 for tier in TIERS]
    study.run(space, cost, trials=40, max_bits=100)
    assert max((broken.measured + cost.measured).values()) == 1
    assert len(study.found()) == len(TIERS) + 40
    again = Search(tmp_path / "a.study", {"model": "a"}, population=8)
    again.run(space, Cost(MANY, 0), trials=40, max_bits=100)  # nothing is left to do
    assert again.found() == study.found()


def test_the_same_seed_finds_the_same(tmp_path: Path) -> None:
    space, found = made_space(MANY), []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        study = Search(tmp_path / name, {}, seed, population=8)
        study.run(space, Cost(MANY), trials=30, max_bits=100)
        found.append(study.found())
    assert found[0] == found[1] != found[2]


def test_what_layers_lose_is_measured_once(tmp_path: Path) -> None:
    measured: list[tuple[Tier, ...]] = []
    def measure(pairs: Sequence[Tier]) -> float:
        if len(measured) == 7:
            raise KeyboardInterrupt
        measured.append(tuple(pairs))
        return len(measured) - 2.0  # rounding may leave a little less than nothing
    with pytest.raises(KeyboardInterrupt):
        Search(tmp_path / "a.study", {}).losses(2, measure)
    k, v = Search(tmp_path / "a.study", {}).losses(2, lambda pairs: measured.append(tuple(pairs)) or 25.6)
    assert k == {2: (0, 0), 3: (1, 2), 4: (3, 4), 8: (3 / 256, 4 / 256)}
    assert v == {2: (5, 25.6), 3: (25.6, 25.6), 4: (25.6, 25.6), 8: (0.1, 0.1)}
    assert measured == [pairs for bits in (2, 3, 4) for pairs in ((Tier(bits, 16), FP16), (FP16, Tier(bits, 16)))
                        ] + [pairs for bits in (2, 3, 4) for pairs in ((Tier(16, bits), FP16), (FP16, Tier(16, bits)))]


def test_a_profile_is_measured_once(tmp_path: Path) -> None:
    errors = np.array([[0.5, 0.25], [0.125, 1 / 3]])
    np.testing.assert_array_equal(Search(tmp_path / "a.study", {}).profile(lambda: errors), errors)
    np.testing.assert_array_equal(Search(tmp_path / "a.study", {}).profile(lambda: pytest.fail("again")), errors)


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    Search(tmp_path / "a.study", {"model": "a", "chunk": 32})
    with pytest.raises(TuneError, match=r"another search \(chunk was 32, is 64\)"):
        Search(tmp_path / "a.study", {"model": "a", "chunk": 64})
    (tmp_path / "b.study").write_text("not a journal\n")
    with pytest.raises(TuneError, match=r"b\.study cannot be read"):
        Search(tmp_path / "b.study", {})
    with pytest.raises(TuneError, match="study file"):
        Search(tmp_path, {})


@settings(deadline=None)
@given(points=NUMBERS, bits=st.none() | st.integers(0, 6))
def test_the_choice_is_on_the_front(points: list[tuple[int, int]], bits: int | None) -> None:
    found = [Found((TIERS[i % 4],), float(cost), float(error)) for i, (cost, error) in enumerate(points)]
    best = front(found, 5)
    assert [each.bits for each in best] == sorted(each.bits for each in best)
    if bits is not None and bits < best[0].bits:
        with pytest.raises(TuneError, match=f"at most {bits} bits"):
            report.choose(best, found, bits, "K4V4")
        return
    chosen = report.choose(best, found, bits, "K4V4")
    rival = min((each.kl for each in found if each.pairs == (TIERS[2],)), default=-1.0)
    assert chosen in best
    if bits is not None:
        assert chosen.bits <= bits and chosen.kl == min(each.kl for each in found if each.bits <= bits)
    elif any(each.kl <= rival for each in best):
        assert chosen.kl <= rival and chosen.bits == min(each.bits for each in best if each.kl <= rival)
    else:
        assert chosen == best[-1]


# Prompts.

def test_prompts_are_read_and_what_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"context": "c", "query": "q"}\n\n{"context": "c", "query": "", "answer": "a"}\n')
    assert read_prompts(file) == [Prompt("c", "q"), Prompt("c", "", "a")]
    for line in ("[]", "{", '{"context": "c"}', '{"context": 1, "query": "q"}',
                 '{"context": "", "query": "", "x": ""}'):
        file.write_text('{"context": "c", "query": "q"}\n' + line)
        with pytest.raises(PromptError, match=r"prompts\.jsonl, line 2: expected a JSON object"):
            read_prompts(file)
    with pytest.raises(PromptError, match="No such file"):
        read_prompts(tmp_path / "nowhere")


def test_prompts_of_a_text_are_windows_of_it(model: Model) -> None:
    prompts, again, others = (prompts_of_text(model, HANDBOOK, 6, 200, 16, seed) for seed in (3, 3, 4))
    assert prompts == again != others
    for prompt in prompts:
        assert prompt.context in HANDBOOK
        assert 180 < len(model.tokenizer.encode(prompt.context)) <= 220
    assert all(prompt.answer in prompt.context for prompt in prompts[::3])
    assert [prompt.answer for prompt in prompts[1::3]] == [None, None]
    assert all(prompt.context + prompt.answer in HANDBOOK for prompt in prompts[2::3])
    with pytest.raises(PromptError, match="a window and what follows it take 100016"):
        prompts_of_text(model, HANDBOOK, 1, 100_000, 16, seed=0)


@pytest.mark.parametrize(("prompts", "message"), [
    ([], "no calibration prompt"), ([Prompt(HANDBOOK[:20], "Who?")], "calibration prompt 1 has 0 whole chunks"),
    ([PROMPTS[0], Prompt(HANDBOOK[:1500], "Who?", "")], "calibration prompt 2: its answer has 0 tokens"),
])
def test_prompts_that_measure_nothing_are_refused(model: Model, prompts: list[Prompt], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        calibrate(model, prompts, answer_tokens=8)


# The command line.

SMALL = ("--count", "2", "--tokens", "200", "--answer-tokens", "6", "--candidates", "K2V2,K4V2,K4V4,K8V8",
         "--population", "4", "--backend", "cpu", "--threads", "1")


@pytest.mark.parametrize("by", ["losses", "output"])
def test_a_search_writes_pairs_that_the_policies_read(by, path, tmp_path, model, monkeypatch, capsys) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "pairs.json"
    text.write_text(HANDBOOK, encoding="utf-8")
    command = [str(path), "--text", str(text), "--out", str(out), *SMALL, "--max-bits", "10", "--profile", by]
    assert tune.main([*command, "--trials", "6"]) == 0
    shown = capsys.readouterr().out
    data = json.loads(out.read_text())
    assert f"chosen: {data['bits']:.3f} bits, KL {data['kl']:.5f}" in shown
    assert (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG")
    kls = [entry["kl"] for entry in data["pareto"]]
    assert kls == sorted(kls, reverse=True) and len(data["even"]) == 4
    doc = model.read(HANDBOOK[:3000])
    for policy in ("kvtuner", "cocktail", "budget"):
        plan = doc.plan("Who?", policy=policy, pairs=out, max_tokens=4)
        lowest = [min((plan.layout.tiers[i] for i in chunks), key=lambda t: t.k_bits + t.v_bits)
                  for chunks in plan.assignment]
        assert policy != "kvtuner" or list(map(str, lowest)) == data["pairs"]
    assert doc.plan("Who?", policy="kvtuner", pairs=out, pairs_bits=data["pareto"][0]["bits"], max_tokens=4)

    # Again: nothing is measured anew, and another choice is written.
    monkeypatch.setattr(Calibration, "kl", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(tune_profile, "profile", lambda *_: pytest.fail("profiled again"))
    assert tune.main([*command, "--trials", "6", "--choose", str(data["pareto"][0]["bits"] + 1e-6)]) == 0
    assert json.loads(out.read_text())["pairs"] == data["pareto"][0]["pairs"]
    capsys.readouterr()
    assert tune.main([*command, "--chunk", "64"]) == 2
    assert "belongs to another search (chunk was 32, is 64" in capsys.readouterr().err


def test_quick_is_overridden_by_what_follows() -> None:
    options = tune.parser().parse_args(["model", "--out", "p.json", "--text", "t", "--quick", "--trials", "5"])
    assert (options.count, options.trials) == (3, 5)


def test_ctrl_c_says_how_to_go_on(path: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt
    monkeypatch.setattr(Calibration, "kl", interrupt)
    text = tmp_path / "text.txt"
    text.write_text(HANDBOOK, encoding="utf-8")
    assert tune.main([str(path), "--text", str(text), "--out", str(tmp_path / "p.json"), *SMALL]) == 130
    assert capsys.readouterr().err.endswith("interrupted; the same command goes on from here\n")


@pytest.mark.parametrize(("given", "message"), [
    ([], "give one of --prompts and --text"), (["--prompts", "a", "--text", "b"], "give one of --prompts and --text"),
    (["--text", "nowhere.txt"], "nowhere.txt: No such file"), (["--prompts", "nowhere"], "nowhere: No such file"),
    (["--text", "t", "--trials", "0"], "--trials is 0; expected at least 1"), (["--text", "t", "--sink", "-1"], "sink"),
    (["--text", "t", "--similar", "1"], "--similar is 1"), (["--text", "t", "--max-bits", "-3"], "--max-bits is -3"),
    (["--text", "t", "--population", "1"], "--population is 1"), (["--text", "t", "--choose", "0"], "--choose is 0"),
    (["--text", "t", "--study", "nowhere/study"], "nowhere/study: its folder does not exist"),
    (["--text", "t", "--candidates", "K4V4"], "two or more different pairs"),
    (["--text", "t", "--candidates", "K4V4,K9V9"], "k_bits is 9"),
])
def test_bad_input_is_one_line_and_exit_code_2(path, tmp_path, monkeypatch, capsys, given, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert tune.main([str(path), "--out", "pairs.json", "--backend", "cpu", "--threads", "1", *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_missing_packages_are_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert tune.main(["model", "--text", "t", "--out", "p.json"]) == 2
    assert "optuna cannot be imported; run: pip install 'cocktail-kv[tune]'" in capsys.readouterr().err
