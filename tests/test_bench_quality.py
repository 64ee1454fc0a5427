"""bench.quality: figures that say what they claim to say, on hand-made samples and on a tiny model."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quality_samples import run_of, sample
from tiny_model import save_tiny_model

import cocktail
from bench import quality_report
from bench.prompts import Prompt, build_text
from bench.quality_measure import (
    ANSWER_TOKENS,
    Judges,
    correctness,
    make_plans,
    measure,
    recall,
)
from bench.quality_report import at_bytes, best_at_most, bits_at, goals, ratio, summarize
from bench.quality_settings import (
    BITS,
    CURVE,
    FP16,
    Choice,
    Setting,
    budget,
    main_settings,
)
from cocktail.scorers import load_scorer
from cocktail.verify import divergence, log_softmax
from runtime.arena import ArenaLayout
from runtime.engine import read
from runtime.errors import PlanError, PromptError
from runtime.forced import force
from runtime.plan import FP16 as FP16_TIER
from runtime.plan import DocumentShape, Plan, Tier

SENTENCE = "The ship sank in 1912."


def count(text: str) -> int:
    """A stand-in for a tokenizer."""
    return -(-len(text) * 10 // 36)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> cocktail.Model:
    return cocktail.load(save_tiny_model(tmp_path_factory.mktemp("tiny")), backend="cpu", threads=1)


@pytest.fixture(scope="module")
def context() -> str:
    return "\n\n".join([build_text(600, count), SENTENCE, build_text(200, count)])


def question(context: str, kind: str, lead: str, answer: str) -> Prompt:
    begin = context.index(SENTENCE)
    return Prompt(kind, context, "In which year did the ship sink?", lead, answer, (begin, begin + len(SENTENCE)))


# Forcing.

@pytest.mark.parametrize("options", [{"policy": "fp16"}, {"policy": "uniform", "tier": "K3V2"},
                                     {"policy": "budget", "kv_bits": 3.4}, {"policy": "cocktail", "no_reorder": True},
                                     {"policy": "atom"}, {"policy": "kivi", "bits": 4, "residual": 0}])
@pytest.mark.parametrize("n", [1, 2, 17])
def test_forcing_at_once_is_forcing_token_by_token(model, context, options, n):
    document = model.read(context)
    answer = model.tokenizer.encode(build_text(300, count))[:n]
    prompt, plan = document.prompt("When?"), document.plan("When?", max_tokens=20, **options)
    reading = read(model.engine, prompt, [document.plan("When?", policy="fp16", max_tokens=20), plan])
    expected = reading.force(answer, 1)
    np.testing.assert_allclose(force(reading, answer, 1), expected, atol=1e-4)
    np.testing.assert_array_equal(force(reading, answer, 1)[0], expected[0])
    np.testing.assert_array_equal(reading.force(answer, 1), expected)  # and leaves nothing behind


def test_an_answer_longer_than_its_room_is_refused(model, context):
    document = model.read(context)
    reading = read(model.engine, document.prompt("When?"), [document.plan("When?", policy="fp16", max_tokens=4)])
    with pytest.raises(PromptError, match="6 ids; expected at most 5"):
        force(reading, [3] * 6, 0)


# Figures of one prompt.

@given(st.integers(0, 2**32 - 1), st.floats(0.1, 30))
def test_divergence_is_the_textbook_sum(seed, scale):
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((3, 50)) * scale for _ in range(2))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (a, b))
    found = divergence(log_softmax(a), log_softmax(b))
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(axis=1), rtol=1e-8, atol=1e-9)
    assert (divergence(log_softmax(a), log_softmax(a)) == 0).all()


def test_log_softmax_survives_large_logits():
    assert np.isfinite(log_softmax(np.array([[1e4, -1e4, 0.0]], np.float32))).all()


def plan_of(layers: list[list[int]], tiers: list[Tier]) -> Plan:
    shape = DocumentShape(n_layers=len(layers), n_kv_heads=1, head_dim=16, chunk=8, n_chunks=len(layers[0]), prefix=0,
                          remainder=0, suffix=1, max_new=1, window=None)
    layout = shape.layout(tiers, [layers[0].count(tier) for tier in range(len(tiers))])
    return Plan(layout, tuple(map(tuple, layers)), policy="test", scorer="test")


def test_recall_counts_the_needed_chunks_above_the_lowest_tier_in_every_layer():
    tiers = [FP16_TIER, Tier(8, 8), Tier(4, 4), Tier(3, 2)]
    plan = plan_of([[0, 3, 1, 3, 2, 3]], tiers)
    assert recall(plan, [2, 4]) == 1
    assert recall(plan, [1, 2]) == 0.5
    assert recall(plan, [1, 3]) == 0
    assert math.isnan(recall(plan, []))
    assert math.isnan(recall(plan_of([[0, 0]], [FP16_TIER]), [1]))
    layers = plan_of([[0, 3, 1, 3, 2, 3], [0, 1, 3, 3, 2, 3], [0, 3, 1, 3, 2, 3]], tiers)
    assert recall(layers, [2]) == pytest.approx(2 / 3)


def test_judges_rank_as_their_names_say(model, context):
    documents = {chunk: model.read(context, chunk=chunk) for chunk in (16, 32)}
    prompt = question(context, "literal", "", " 1912")
    judges = Judges(documents, prompt, {"bm25": load_scorer("bm25"), "encoder": load_scorer("random", seed=5)}, seed=1)
    for chunk, document in documents.items():
        needed = set(prompt.needed_chunks(document.chunk_texts))
        scores = {name: judges.get(name, chunk).scores for name in
                  ("bm25", "encoder", "hybrid", "oracle", "anti-oracle", "random", "none")}
        assert {len(found) for found in scores.values()} == {document.n_chunks}
        assert set(np.argsort(-scores["oracle"])[: len(needed)]) == needed
        np.testing.assert_array_equal(scores["anti-oracle"], -scores["oracle"])
        parts = [(scores[name] - scores[name].mean()) / scores[name].std() for name in ("bm25", "encoder")]
        np.testing.assert_allclose(scores["hybrid"], sum(parts), atol=1e-4)
        np.testing.assert_array_equal(scores["random"], load_scorer("random", seed=1).score(document.chunk_texts, ""))
        assert not scores["none"].any()


def test_measure_gives_the_fp16_cache_no_divergence_and_the_mix_some(model, context):
    settings = [FP16, budget(3.4, "bm25"), budget(3.4, "oracle"), Setting.of("coarse", "uniform", tier="K2V2"),
                Setting.of("chunks of 16", "budget", "oracle", chunk=16, kv_bits=4), budget(3.4, "attention")]
    for kind, lead, answer in (("literal", "The year is", " 1912"), ("copy", "The ship", " sank in 1912."),
                               ("classify", "Text: a\nCategory:", " prose"), ("continue", "", "and so on and on")):
        prompt = question(context, kind, lead, answer)
        found = measure(model, prompt, settings, {"bm25": load_scorer("bm25")}, seed=0)
        assert list(found) == [setting.name for setting in settings]
        exact, scored, oracle, coarse, small, attention = found.values()
        assert not any(exact.kl) and all(exact.agree) and exact.bpv >= 16
        assert 0 < np.mean(scored.kl) < np.mean(coarse.kl) and scored.bpv <= 3.4
        assert oracle.recall == small.recall == 1 and oracle.bpv == scored.bpv == attention.bpv
        assert 0 <= attention.recall <= 1 and attention.kl != scored.kl
        assert math.isnan(coarse.recall) and math.isnan(exact.recall), "nothing was scored"
        assert {len(sample.kl) for sample in found.values()} == {len(exact.agree)}
        if prompt.dictated:  # a lead is no part of it, and without one the first token is not
            assert len(exact.kl) == len(model.tokenizer.encode(answer)) - (not lead)
        else:
            assert 0 < len(exact.kl) <= ANSWER_TOKENS - 1
        assert 0 <= exact.correct <= 1


def test_an_answer_is_right_where_greedy_decoding_would_say_it():
    best = np.array([7, 1, 2, 3, 9])  # row i's favourite, for answer[i]
    logits = np.eye(10, dtype=np.float32)[best]
    assert correctness(logits, [0, 1, 2, 3, 9], lead=2, exact=True) == 1
    assert correctness(logits, [7, 0, 2, 3, 9], lead=2, exact=True) == 1, "the lead is given"
    assert correctness(logits, [7, 1, 2, 3, 0], lead=2, exact=True) == 0
    assert correctness(logits, [7, 1, 2, 3, 0], lead=2, exact=False) == pytest.approx(2 / 3)
    assert correctness(logits, [0, 1, 2, 3, 0], lead=0, exact=False) == pytest.approx(3 / 4), "the first is not judged"


def test_a_lead_that_melts_into_the_answer_is_refused(model, context):
    with pytest.raises(ValueError, match="does not begin with the tokens"):
        measure(model, question(context, "literal", "The ye", "ar is 1912"), [FP16], {}, seed=0)


def test_a_refused_setting_is_named(model, context):
    for wrong, said in ((Setting.of("odd", "uniform", tier="K5V5"), "odd: .*K5V5|odd: tier"),
                        (Setting.of("poor", "budget", "bm25", kv_bits=1.0), "poor: .*expected at least"),
                        (Setting.of("new", "newest"), "new: there is no policy")):
        with pytest.raises(PlanError, match=said):
            measure(model, question(context, "literal", "The year is", " 1912"), [FP16, wrong],
                    {"bm25": load_scorer("bm25")}, seed=0)


def test_a_match_takes_the_bytes_of_its_like_and_no_more(model, context):
    like = [Setting.of("a", "uniform", tier="K4V4"), Setting.of("b", "uniform", tier="K2V2", sink=0)]
    settings = [Setting.of(f"={s.name}", "budget", "bm25", match=s.name, sink=1) for s in like] + [FP16, *like]
    documents = {32: model.read(context)}
    prompt = question(context, "literal", "", " 1912")
    judges = Judges(documents, prompt, {"bm25": load_scorer("bm25")}, 0)
    plans = make_plans(documents, prompt, settings, judges, 0, room=8)
    bits = {name: cocktail.plan_stats(plan)["bpv"] for name, plan in plans.items()}
    assert bits["a"] - 0.15 < bits["=a"] <= bits["a"]
    assert "=b" not in plans, "no budget is so low: left out, not something else"


def test_a_match_of_other_chunks_takes_the_bytes_of_the_whole_cache(model, context):
    """The FP16 tail grows with the chunks, and bits per value leave it out."""
    documents = {chunk: model.read(context, chunk=chunk) for chunk in (16, 32, 64)}
    like = Setting.of("like", "budget", "bm25", kv_bits=6, chunk=16)
    same = Setting.of("same", "budget", "bm25", match="like", chunk=64)
    prompt = question(context, "literal", "", " 1912")
    judges = Judges(documents, prompt, {"bm25": load_scorer("bm25")}, 0)
    plans = make_plans(documents, prompt, [FP16, same, like], judges, 0, room=8)
    sizes = {name: ArenaLayout(plan.layout) for name, plan in plans.items()}
    assert plans["same"].layout.remainder > plans["like"].layout.remainder
    assert 0.97 * sizes["like"].nbytes < sizes["same"].nbytes <= sizes["like"].nbytes


# Figures of many prompts.

def test_summary_pools_tokens_and_splits_kinds():
    row = summarize(budget(3.3, "bm25"), [sample([0.3], 1), sample([0, 0, 0], 0, "paraphrased", recalled=0),
                                          sample([0, 0], 0.75, "copy", bpv=3.1, recalled=math.nan)])
    assert row["kl"] == pytest.approx(0.05)  # over tokens, not over prompts
    assert row["kl_low"] <= 0.05 <= row["kl_high"] <= 0.3
    assert row["kl_by_kind"] == {"literal": pytest.approx(0.3), "paraphrased": 0, "copy": 0}
    assert (row["correct"]["literal"], row["correct"]["paraphrased"], row["correct"]["copy"]) == (1, 0, 0.75)
    assert (row["recall"]["literal"], row["recall"]["paraphrased"]) == (1, 0) and math.isnan(row["recall"]["copy"])
    assert math.isnan(row["correct"]["lookup"])
    assert row["bpv"] == pytest.approx((3.3 + 3.3 + 3.1) / 3) and row["bpv_max"] == 3.3


def test_p99_is_over_tokens():
    row = summarize(FP16, [sample([0.0] * 98), sample([1.0, 1.0])])
    assert row["kl_p99"] == pytest.approx(np.percentile([0.0] * 98 + [1.0] * 2, 99))


def test_a_ratio_is_paired_by_prompt():
    hard = [sample([10.0 ** i]) for i in range(6)]
    half = [sample([10.0 ** i / 2]) for i in range(6)]
    assert ratio(hard, half) == pytest.approx((2, 2, 2)), "prompts differ by decades, the pairs not at all"


def test_a_curve_is_read_between_its_points_and_not_before_them():
    curve = [(4.0, 0.01), (3.0, 0.1)]
    assert at_bytes(curve, 3.5) == pytest.approx(math.sqrt(0.1 * 0.01))
    assert at_bytes(curve, 4) == pytest.approx(0.01)
    assert at_bytes(curve, 9) == pytest.approx(0.01)
    assert at_bytes(curve, 2.99) is None
    assert at_bytes([], 3) is None


@given(st.lists(st.tuples(st.integers(20, 80).map(lambda tenths: tenths / 10), st.floats(1e-5, 1)), min_size=1,
                max_size=8, unique_by=lambda point: point[0]),
       st.floats(1e-6, 2))
def test_the_bits_of_a_kl_are_the_first_at_which_the_curve_has_it(curve, kl):
    bits, least = bits_at(curve, kl), min(curve)
    if bits is None:
        assert min(y for _, y in curve) > kl
    elif least[1] <= kl:
        assert bits == least[0], "no fewer bits were measured"
    else:
        assert at_bytes(curve, bits) == pytest.approx(kl, rel=1e-6)
        assert all(y > kl for x, y in curve if x < bits)


def test_the_best_of_those_that_take_no_more():
    rows = [{"bpv": 3.0, "kl": 0.2}, {"bpv": 4.0, "kl": 0.1}, {"bpv": 3.5, "kl": 0.3}, {"bpv": 5.0, "kl": 0.01}]
    assert best_at_most(rows, 4.0) is rows[1]
    assert best_at_most(rows, 3.9) is rows[0]
    assert best_at_most(rows, 2.9) is None


def test_goals_that_are_met():
    samples, rows = run_of(low=0.014, high=0.01, kivi=0.031, paper=0.02, blind=0.05)
    found = goals(samples, rows)
    assert {name: goal["met"] for name, goal in found.items()} == {
        f"budget@3.3/{CURVE}": True, "curve below kivi-4": True, "curve below cocktail/encoder": True,
        "curve below cocktail/encoder, no search": True, f"budget@3.8/{CURVE} beside kivi-4": True,
        "cocktail/encoder": True}
    assert found["curve below cocktail/encoder"]["times"] == pytest.approx(0.02 / math.sqrt(0.014 * 0.01))
    assert "MISSED" not in "".join(goal["text"] for goal in found.values())


def test_what_lies_beyond_the_curve_is_beaten_by_its_end_or_not_judged():
    for kl, text in ((0.02, "takes fewer.*2.00 times, met"), (0.009, "5.00 bpv are more than the curve ends with")):
        samples, rows = run_of(low=0.014, high=0.01, kivi=kl)
        assert re.search(text, goals(samples, rows)["curve below kivi-4"]["text"])


def test_goals_that_are_missed():
    samples, rows = run_of(low=0.016, high=0.011, kivi=0.011, paper=0.012, blind=0.023)
    assert not any(goal.get("met") for name, goal in goals(samples, rows).items() if "no search" not in name)


def test_goals_of_pairs():
    """The file's choice beside K4V4 everywhere, both together beside each alone, the curve of those that have it."""
    def kept(setting, kl, bpv):
        return setting, [sample([kl] * 4, bpv=bpv) for _ in range(5)]

    for both, met in ((0.001, True), (0.004, False)):
        samples = dict([kept(FP16, 0, 16), kept(Setting.of("uniform K4V4", "uniform", tier="K4V4"), 0.004, 4.5),
                        kept(Setting.of("kvtuner", "kvtuner", pairs="p"), 0.003, 4.0),
                        kept(budget(3.3, CURVE), 0.02, 3.3), kept(budget(3.3, CURVE, "p"), 0.002, 3.3),
                        kept(Setting.of(f"budget/{CURVE} = kvtuner", "budget", CURVE, match="kvtuner"), 0.005, 4.0),
                        kept(Setting.of(f"budget+pairs/{CURVE} = kvtuner", "budget", CURVE, match="kvtuner",
                                        pairs="p"), both, 4.0)])
        found = goals(samples, [summarize(setting, each) for setting, each in samples.items()])
        assert found["pairs beside uniform K4V4"]["met"] and found["curve below kvtuner"]["met"]
        assert found["both beside each alone at 4.00 bpv"]["met"] is met
        assert not found[f"budget@3.3/{CURVE}"]["met"] and found[f"budget+pairs@3.3/{CURVE}"]["met"]


def test_a_task_score_may_be_one_prompt_short_and_no_more():
    for wrong, met in ((1, True), (2, False)):
        samples, _ = run_of(low=0.01)
        setting = budget(3.3, CURVE)
        samples[setting] = [sample([0.01] * 4, correct=0 if i < wrong else 1) for i in range(5)]
        rows = [summarize(setting, found) for setting, found in samples.items()]
        goal = goals(samples, rows)[setting.name]
        assert goal["met"] is met and goal["prompts_short"] == {"literal": pytest.approx(wrong)}


def test_tables_say_what_was_measured(capsys):
    matched = Setting.of(f"budget/{CURVE} = kivi-4", "budget", CURVE, match="kivi-4")
    samples, _ = run_of(low=0.014, high=0.01, kivi=0.03)
    samples[matched] = [sample([0.005] * 4, bpv=4.9) for _ in range(5)]
    samples[Setting.of("uniform K4V4", "uniform", tier="K4V4")] = [sample([0.02] * 4, bpv=4.6) for _ in range(5)]
    samples[budget(3.3, "random")] = [sample([0.028] * 4, recalled=0.2) for _ in range(5)]
    rows = [summarize(setting, found) for setting, found in samples.items()]
    quality_report.print_matched(samples, rows)
    quality_report.print_scorers(samples, rows)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["kivi-4", "5.00", "0.0300", f"budget/{CURVE}", "0.0050 at 4.90", "6.00 (6.00-6.00)", "uniform K4V4 at 4.60",
            "0.0200"] in lines
    assert [f"budget@3.3/{CURVE}", "3.30", "0.0140", "2.00 (2.00-2.00)", "1.00"] in lines
    assert ["budget@3.3/random", "3.30", "0.0280", "", "0.20"] in lines


def test_bits_at_a_methods_kl_are_rounded_up_and_not_guessed(capsys):
    settings = {3.0: 0.1, 3.3: 0.01, 3.8: 0.001}
    samples = {budget(bits, CURVE, "p"): [sample([kl], bpv=bits)] for bits, kl in settings.items()}
    samples |= {budget(3.3, "bm25", "p"): [sample([0.01], bpv=3.3)]}  # a point is no curve
    samples |= {Setting.of(name, "kivi", bits=4): [sample([kl], bpv=5)]
                for name, kl in (("even", math.sqrt(0.1 * 0.01)), ("bad", 0.2), ("good", 0.0001))}
    quality_report.print_bits([summarize(setting, found) for setting, found in samples.items()])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[3] == ["method", "bpv", "KL", f"budget+pairs/{CURVE}"]
    assert {line[0]: line[3] for line in lines[5:]} == {"even": "3.15", "bad": "< 3.00", "good": ""}


# Settings, sweeps, files.

def test_settings_have_names_of_their_own_and_matches_that_exist():
    settings = main_settings(Choice(pairs="pairs.json", calibration="levels.safetensors"))
    names = [setting.name for setting in settings]
    assert settings[0] == FP16 and len(set(names)) == len(names)
    assert {setting.policy for setting in settings} == {"fp16", "uniform", "kivi", "atom", "kvquant", "kvtuner",
                                                        "cocktail", "budget"}
    matched = [setting for setting in settings if setting.match]
    assert {"kivi-2", "kivi-4", "atom", "kvquant-4", "kvtuner"} <= {setting.match for setting in matched} <= set(names)
    assert all("pairs" in dict(setting.options) or setting.match.startswith("kvtuner") for setting in matched)
    assert "budget@3.3/hybrid" in names and "budget@3.3/attention" not in names
    assert {f"budget+pairs@{bits:g}/{scorer}" for bits in BITS for scorer in ("hybrid", "attention")} <= set(names)


def test_what_is_left_out_is_left_out():
    settings = main_settings(Choice(groups=("uniform", "budget", "matched"), scorers=("bm25",), bits=(3.3,)))
    assert {setting.policy for setting in settings} == {"fp16", "uniform", "budget"}
    assert {setting.scorer for setting in settings} == {"none", "bm25"}
    for group in ("kvtuner", "kvquant"):
        with pytest.raises(SystemExit, match=f"--without {group}"):
            Choice(groups=(group,))
