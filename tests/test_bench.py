"""The benches' own arithmetic: prompts that ask what they claim to ask, and figures that say what they claim to say."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter

import numpy as np
import pytest
from demo_model import demo_model
from hypothesis import given
from hypothesis import strategies as st

import cocktail
from bench import agree, old_glibc, peer_llama, report
from bench.prompts import KINDS, MAX_TOKENS, MIN_TOKENS, Prompt, build_prompts, build_text
from bench.prompts_tasks import CLASSES, FACTS, NIAH_QUERY, RECORD, RECORDS, shared_words


def count(text: str) -> int:
    """A stand-in for a tokenizer: about as many tokens as SmolLM2 makes of this text."""
    return -(-len(text) * 10 // 36)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return build_prompts(count, n=48, seed=3)


def of_kind(prompts: list[Prompt], *kinds: str) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.kind in kinds]


def test_prompts_are_as_many_and_as_long_as_promised(prompts):
    assert Counter(prompt.kind for prompt in prompts) == dict.fromkeys(KINDS, 8)
    for prompt in prompts:
        assert MIN_TOKENS * 0.8 <= count(prompt.context) <= MAX_TOKENS
        assert prompt.context.isascii()
    for kind in KINDS:
        lengths = [count(prompt.context) for prompt in of_kind(prompts, kind)]
        assert max(lengths) > 1.5 * min(lengths), "every task meets several lengths"


def test_prompts_follow_the_seed(prompts):
    assert build_prompts(count, n=48, seed=3) == prompts
    assert build_prompts(count, n=48, seed=4) != prompts


def test_a_run_of_fewer_or_shorter_prompts_is_what_it_says():
    short = build_prompts(count, n=7, seed=0, longest=2000)
    assert len(short) == 7
    assert all(count(prompt.context) <= 2000 for prompt in short)


def test_the_needed_span_holds_the_answer(prompts):
    for prompt in of_kind(prompts, "paraphrased", "literal", "lookup", "copy"):
        begin, end = prompt.needed
        span = " ".join(prompt.context[begin:end].split())
        assert prompt.answer.strip() in span
        if prompt.kind == "copy":
            assert span == prompt.lead + prompt.answer
            assert prompt.query.split('"')[1] == prompt.lead
            assert " ".join(prompt.context.split()).count(prompt.lead) == 1
        else:
            assert prompt.context.count(prompt.answer.strip()) == 1, "nothing else answers"
    assert all(prompt.needed is None for prompt in of_kind(prompts, "classify", "continue"))


def test_a_document_holds_one_record_of_the_name_that_is_asked_for(prompts):
    for prompt in of_kind(prompts, "lookup"):
        assert prompt.context.count(prompt.lead) == 1
        assert len(re.findall(RECORD.format(name="[a-z]+", number="[0-9]{5}"), prompt.context)) == RECORDS


def test_classes_have_examples_and_the_asked_text_is_none_of_them(prompts):
    for prompt in of_kind(prompts, "classify"):
        labels = Counter(re.findall(r"^Category: (.*)$", prompt.context, re.MULTILINE))
        assert set(labels) == set(CLASSES)
        assert max(labels.values()) - min(labels.values()) <= 0.5 * max(labels.values())
        text = prompt.lead.removeprefix("Text:\n").removesuffix("\nCategory:")
        assert text not in prompt.context
        assert [label for label, pattern in CLASSES.items() if pattern.search(text)] == [prompt.answer.strip()]


def test_a_continuation_goes_on_where_the_context_ends(prompts):
    whole = " ".join(build_text(10**6, count).split())
    for prompt in of_kind(prompts, "continue"):
        end = " ".join(prompt.context.split())[-100:]
        assert f"{end} {prompt.answer}" in whole
        assert not prompt.query and not prompt.lead


def test_paraphrased_questions_share_no_content_word_with_the_planted_fact(prompts):
    for prompt in of_kind(prompts, "paraphrased"):
        begin, end = prompt.needed
        assert not shared_words(prompt.query + prompt.lead, prompt.context[begin:end])


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
    begin, end = prompt.needed or (0, 0)
    touched = {at // size for at in range(begin, min(end, whole))}
    assert set(prompt.needed_chunks(chunks)) == touched


def test_chunk_texts_that_do_not_join_to_the_context_are_refused(prompts):
    with pytest.raises(ValueError, match="do not join"):
        prompts[0].needed_chunks(["something else"])


@pytest.mark.parametrize("tokens", [10, 300, 4000])
def test_build_text_fills_the_length(tokens):
    assert 0.9 * tokens - 5 <= count(build_text(tokens, count)) <= tokens


def test_the_closing_line_is_strict_json(capsys, tmp_path):
    report.emit({"a": [1.5, float("nan")], "b": {"c": float("nan")}}, str(tmp_path / "out.json"))
    line = capsys.readouterr().out
    assert json.loads(line) == {"a": [1.5, None], "b": {"c": None}} == json.loads((tmp_path / "out.json").read_text())


def test_interval_redraws_clusters():
    values = np.random.default_rng(0).normal(5, 1, 400)
    low, high = report.interval(len(values), lambda draws: values[draws].mean(axis=1))
    assert low < values.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.1)
    assert report.interval(5, lambda draws: np.full(len(draws), 2.0)) == (2, 2)


def test_differences_between_logits():
    found = agree.Difference.of(np.array([[1, 2], [3, 4]], np.float32), np.array([[1, 2], [0, 8]], np.float32))
    assert (found.most, found.rms) == (4, 2.5)


def test_names_with_commas_between_them():
    parse = report.some_of(("a", "b"))
    assert parse("b, a,") == ["b", "a"]
    assert report.some_of()("x:y=1") == ["x:y=1"]
    assert report.some_of(("a",), least=0)("") == []
    for wrong, why in (("a,c", "no c; there are a, b"), ("a,a", "expected different"), (",", "expected different")):
        with pytest.raises(argparse.ArgumentTypeError, match=why):
            parse(wrong)


def test_verdict_names_the_side_of_the_goal():
    assert report.verdict(0.92, 0.91).startswith("met")
    assert report.verdict(0.90, 0.91).startswith("MISSED")
    assert report.verdict(0.02, 0.03, at_most=True).startswith("met")


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
