"""The benches' own arithmetic: prompts that ask what they claim to ask, and figures that say what they claim to say."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from demo_model import demo_model
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import save_tiny_model

import cocktail
from bench import old_glibc, peer_llama, quality, report
from bench.prompts import FACTS, MAX_TOKENS, MIN_TOKENS, NIAH_QUERY, Prompt, build_prompts, build_text, shared_words
from bench.quality import Sample, Setting, divergence, log_softmax, measure, recall, summarize
from cocktail.scorers import load_scorer
from runtime.plan import FP16, DocumentShape, Plan, Tier


def count(text: str) -> int:
    """A stand-in for a tokenizer: about as many tokens as SmolLM2 makes of this text."""
    return -(-len(text) * 10 // 36)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return build_prompts(count, n=24, seed=3)


def test_prompts_are_as_many_long_and_paraphrased_as_promised(prompts):
    assert len(prompts) == 24
    assert sum(prompt.kind == "paraphrased" for prompt in prompts) >= 12
    assert {prompt.task for prompt in prompts} == {"niah", "copy"}
    for prompt in prompts:
        assert MIN_TOKENS * 0.8 <= count(prompt.context) <= MAX_TOKENS


def test_prompts_follow_the_seed(prompts):
    assert build_prompts(count, n=24, seed=3) == prompts
    assert build_prompts(count, n=24, seed=4) != prompts


def test_the_needed_span_holds_the_answer(prompts):
    for prompt in prompts:
        begin, end = prompt.needed
        span = " ".join(prompt.context[begin:end].split())
        assert prompt.answer in span
        if prompt.task == "copy":
            assert span == prompt.answer
            quoted = prompt.query.split('"')[1]
            assert span.startswith(quoted)
            assert " ".join(prompt.context.split()).count(quoted) == 1
        else:
            assert prompt.context.count(span) == 1
            assert not any(rival in span for rival in prompt.rivals)


def test_paraphrased_questions_share_no_content_word_with_the_planted_fact(prompts):
    asked = [prompt for prompt in prompts if prompt.kind == "paraphrased"]
    for prompt in asked:
        begin, end = prompt.needed
        assert not shared_words(prompt.query, prompt.context[begin:end])


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.sentence)
def test_every_fact_has_a_question_in_its_words_and_one_in_others(fact):
    assert shared_words(NIAH_QUERY.format(question=fact.literal), fact.sentence)
    assert not shared_words(NIAH_QUERY.format(question=fact.paraphrased), fact.sentence)


@pytest.mark.parametrize(("a", "b"), [("Ships sink.", "A ship"), ("He marries", "she married"), ("crowns", "crowned")])
def test_shared_words_sees_through_inflection(a, b):
    assert shared_words(a, b)


@given(size=st.integers(1, 700), data=st.data())
def test_needed_chunks_are_exactly_those_that_the_span_touches(prompts, size, data):
    prompt = data.draw(st.sampled_from(prompts))
    whole = len(prompt.context) // size * size
    chunks = [prompt.context[at : at + size] for at in range(0, whole, size)]
    begin, end = prompt.needed
    touched = {at // size for at in range(begin, min(end, whole))}
    assert set(prompt.needed_chunks(chunks)) == touched


def test_chunk_texts_that_do_not_join_to_the_context_are_refused(prompts):
    with pytest.raises(ValueError, match="do not join"):
        prompts[0].needed_chunks(["something else"])


def test_an_answer_counts_only_with_the_right_year_and_no_other_planted_one():
    prompt = Prompt("niah", "literal", "", "", "1912", (0, 0), rivals=("1840",))
    assert prompt.found("It sank in 1912.")
    assert not prompt.found("It sank in 1912 or 1840.")
    assert not prompt.found("It sank in 19123.")


@pytest.mark.parametrize("tokens", [10, 300, 4000])
def test_build_text_fills_the_length(tokens):
    assert 0.9 * tokens - 5 <= count(build_text(tokens, count)) <= tokens


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


def _plan(assignment: list[int], tiers: list[Tier]) -> Plan:
    shape = DocumentShape(n_layers=1, n_kv_heads=1, head_dim=16, chunk=8, n_chunks=len(assignment), prefix=0,
                          remainder=0, suffix=1, max_new=1, window=None)
    layout = shape.layout(tiers, [assignment.count(tier) for tier in range(len(tiers))])
    return Plan(layout, (tuple(assignment),), policy="test", scorer="test")


def test_recall_counts_the_needed_chunks_above_the_lowest_tier():
    plan = _plan([0, 3, 1, 3, 2, 3], [FP16, Tier(8, 8), Tier(4, 4), Tier(3, 2)])
    assert recall(plan, [2, 4]) == 1
    assert recall(plan, [1, 2]) == 0.5
    assert recall(plan, [1, 3]) == 0
    assert math.isnan(recall(plan, []))
    assert math.isnan(recall(_plan([0, 0], [FP16]), [1]))


def test_interval_redraws_clusters():
    values = list(np.random.default_rng(0).normal(5, 1, 400))
    low, high = report.interval(values, lambda drawn: float(np.mean(drawn)))
    assert low < np.mean(values) < high
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.2)
    assert report.interval([2.0] * 5, lambda drawn: float(np.mean(drawn))) == (2, 2)


def test_the_closing_line_is_strict_json(capsys, tmp_path):
    report.emit({"a": [1.5, float("nan")], "b": {"c": float("nan")}}, str(tmp_path / "out.json"))
    line = capsys.readouterr().out
    assert json.loads(line) == {"a": [1.5, None], "b": {"c": None}} == json.loads((tmp_path / "out.json").read_text())


def test_verdict_names_the_side_of_the_goal():
    assert report.verdict(0.92, 0.91).startswith("met")
    assert report.verdict(0.90, 0.91).startswith("MISSED")
    assert report.verdict(0.02, 0.03, at_most=True).startswith("met")


def test_measure_gives_the_fp16_cache_no_divergence_and_the_mix_some(tmp_path):
    model = cocktail.load(save_tiny_model(tmp_path), backend="cpu", threads=1)
    sentence = "The ship sank in 1912."
    context = "\n\n".join([build_text(900, count), sentence, build_text(300, count)])
    begin = context.index(sentence)
    settings = [Setting("fp16"), Setting("budget", "bm25", 3.4), Setting("budget", "oracle", 3.4)]
    scorers = {name: load_scorer("bm25") for name in ("bm25", "hybrid", "none")}
    for task, answer in (("niah", "1912"), ("copy", sentence)):
        prompt = Prompt(task, "literal", context, "In which year did the ship sink?", answer,
                        (begin, begin + len(sentence)))
        exact, scored, oracle = measure(model, prompt, settings, scorers, seed=0).values()
        assert (exact.kl == 0).all() and exact.agree.all() and exact.bpv >= 16
        assert scored.kl.mean() > 0 and scored.bpv <= 3.4
        assert oracle.recall == 1 and oracle.bpv == scored.bpv
        longest = quality.ANSWER_TOKENS if task == "niah" else len(model.tokenizer.encode(answer))
        assert 0 < exact.kl.size <= longest - 1


def test_summary_pools_tokens_and_splits_questions():
    def sample(kl: list[float], correct: float, task: str = "niah", kind: str = "literal") -> Sample:
        return Sample(task, kind, 3.3, np.array(kl), np.array([True] * len(kl)), correct, 1.0)

    row = summarize(Setting("budget", "bm25", 3.3), [sample([0.3], 1), sample([0, 0, 0], 0, kind="paraphrased"),
                                                     sample([0, 0], 0.75, "copy")])
    assert row["kl"] == pytest.approx(0.05)  # over tokens, not over prompts
    assert (row["niah_literal"], row["niah_paraphrased"], row["copy"]) == (1, 0, 0.75)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]), st.sampled_from([4, 8]), st.floats(-5, 5))
def test_interleaved_rows_rotate_like_halves(seed, heads, dim, angle):
    """llama.cpp turns neighbouring pairs where Hugging Face turns (i, i + D/2): the same vectors, permuted."""
    weight = np.random.default_rng(seed).standard_normal((heads * dim, 6))
    turns = np.exp(1j * angle * 0.7 ** np.arange(dim // 2))[:, None]
    halves = weight.reshape(heads, 2, dim // 2, 6)
    turned = (halves[:, 0] + 1j * halves[:, 1]) * turns
    expected = np.stack([turned.real, turned.imag], axis=1).reshape(heads * dim, 6)
    pairs = peer_llama._interleave(weight, heads).reshape(heads, dim // 2, 2, 6)
    turned = (pairs[:, :, 0] + 1j * pairs[:, :, 1]) * turns
    found = np.stack([turned.real, turned.imag], axis=2).reshape(heads * dim, 6)
    np.testing.assert_allclose(found, peer_llama._interleave(expected, heads))


def test_llama_cpp_continues_the_same_weights_with_the_same_ids(tmp_path):
    """Both sides of bench.decode run one model: the GGUF written for the peer is our checkpoint."""
    path = demo_model()
    model = cocktail.load(path, backend="cpu", threads=1)
    doc = model.read(build_text(200, count))
    answer = doc.ask("What is this text about?", policy="fp16", max_tokens=16)
    peer_llama.write_f16_gguf(path, tmp_path / "f16.gguf")
    with peer_llama.Peer(tmp_path / "f16.gguf", threads=1, n_ctx=1024, flash=False) as peer:
        prompt = doc.prompt("What is this text about?")
        assert peer.greedy(prompt, len(answer.ids)).ids == answer.ids
        assert peer.greedy(prompt, len(answer.ids), depth=len(prompt) - 1).ids == answer.ids


def test_elf_hash_is_the_one_that_linkers_store():
    assert old_glibc._elf_hash("GLIBC_2.2.5") == 0x09691A75
    assert old_glibc._elf_hash("GLIBC_2.34") == 0x069691B4
