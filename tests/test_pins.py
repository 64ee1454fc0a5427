"""Pinned texts: every chunk that holds one is found, wherever borders fall, and keeps the policy's top tier."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import HANDBOOK

from cocktail.pins import chunks_with
from cocktail.policies import load_policy
from runtime.arena import ArenaLayout
from runtime.errors import PlanError
from runtime.plan import FP16, DocumentShape, Tier

TEXT = HANDBOOK[:3000]
QUESTION = "Who mended the cracked iron pan?"


@pytest.fixture(scope="module")
def doc(model):
    return model.read(TEXT, chunk=8)


@pytest.fixture(scope="module")
def chunk_of_byte(doc):
    """Brute force: the chunk of every byte of the document; -1 behind the last whole one."""
    sizes = [len(doc.model.tokenizer.token_bytes(token)) for token in doc.context_ids]
    return [chunk if chunk < doc.n_chunks else -1 for i, size in enumerate(sizes) for chunk in [i // doc.chunk] * size]


@settings(max_examples=40, deadline=None)
@given(begin=st.integers(0, len(TEXT) - 80), size=st.integers(1, 80))
def test_every_chunk_that_holds_a_part_is_found_and_no_other(doc, chunk_of_byte, begin, size):
    words = TEXT[begin : begin + size].split()
    if not words:
        return
    expected, pattern = set(), r"[ \n]+".join(map(re.escape, words))
    for match in re.finditer(f"(?=({pattern}))", TEXT):
        first, last = (len(TEXT[:at].encode()) for at in match.span(1))
        expected.update(chunk_of_byte[first:last])
    assert chunks_with(doc, [" ".join(words)]) == tuple(sorted(expected - {-1}))


def test_a_text_across_chunks_is_found_in_all_of_them(doc):
    start = len("".join(doc.chunk_texts[:5]))
    text = TEXT[start - 20 : start + 60].strip()
    assert len(chunks_with(doc, [text])) > 2


def test_a_character_that_a_border_cuts_is_in_both_chunks(model):
    text = "a" + "€" * 60
    document = model.read(text, chunk=8)
    pieces = [model.tokenizer.token_bytes(token) for token in document.context_ids]
    ends = [len(b"".join(pieces[: 8 * (i + 1)])) for i in range(document.n_chunks)]
    assert any((end - 1) % 3 for end in ends), "no border cuts a character"
    assert chunks_with(document, ["€"]) == tuple(range(document.n_chunks))


def test_white_space_stands_for_any_other(model):
    document = model.read("word " * 200 + "the iron\n  pan was mended" + " word" * 100, chunk=8)
    assert chunks_with(document, ["iron pan"]) == chunks_with(document, ["iron\n  pan"]) != ()


def test_what_lies_behind_the_last_whole_chunk_needs_no_pin(model):
    document = model.read("word " * 200 + "behind", chunk=64)
    assert document.remainder > 3
    assert chunks_with(document, ["behind"]) == ()


@pytest.mark.parametrize(("texts", "message"), [
    (["zyxwvut 1234567"], r"does not occur in the document: 'zyxwvut 1234567'$"),
    (["the craked iron pan"], r"in the document: 'the craked iron pan'; the nearest passage is '.*crack"),
    ([" \n"], "is empty"),
    ("the", "expected a list"),
])
def test_what_cannot_be_found_is_refused(doc, texts, message):
    with pytest.raises(PlanError, match=message):
        chunks_with(doc, texts)


@pytest.mark.parametrize("options", [{"policy": "cocktail"}, {"policy": "cocktail", "sink": 0, "no_reorder": True}])
def test_thresholds_pin_at_fp16_and_leave_all_other_chunks(doc, options):
    pinned = doc.plan(QUESTION, pin=["iron pan"], max_tokens=4, **options)
    plain = doc.plan(QUESTION, max_tokens=4, **options)
    chunks = chunks_with(doc, ["iron pan"])
    assert chunks
    for tiers, before in zip(pinned.assignment, plain.assignment, strict=True):
        assert {pinned.layout.tiers[tiers[chunk]] for chunk in chunks} == {FP16}
        assert all(pinned.layout.tiers[tiers[chunk]] == plain.layout.tiers[before[chunk]]
                   for chunk in range(doc.n_chunks) if chunk not in chunks)
    assert pinned.notes == (f"pinned at FP16: chunk{'s' * (len(chunks) > 1)} {', '.join(map(str, chunks))}",)
    assert doc.ask(QUESTION, plan=pinned, max_tokens=2).ids


@pytest.mark.parametrize(("options", "top"), [
    ({}, FP16), ({"kv_bits": 6}, FP16), ({"kv_budget": "300KiB"}, FP16), ({"kv_bits": 6, "sink": 3}, FP16),
    ({"kv_bits": 6, "scorer": "attention"}, FP16), ({"kv_bits": 6, "tiers": "K4V2,K8V4"}, Tier(8, 4)),
    ({"tiers": "K4V2,K8V4,K8V8", "shares": ".3,.1"}, Tier(8, 8)),
], ids=str)
def test_a_budget_pins_at_its_top_tier_within_the_budget(doc, options, top):
    chunks = chunks_with(doc, ["iron pan", "THE HARBOUR"])
    pinned = doc.plan(QUESTION, pin=["iron pan", "THE HARBOUR"], max_tokens=4, **options)
    plain = doc.plan(QUESTION, max_tokens=4, **options)
    assert 1 < len(chunks) < 8
    for tiers in pinned.assignment:
        kept = {pinned.layout.tiers[tiers[chunk]] for chunk in chunks}
        assert kept <= {top, FP16}  # the sink is FP16 whatever the tiers
        assert top in kept
    sizes, before = ArenaLayout(pinned.layout), ArenaLayout(plain.layout)
    if options.keys() & {"kv_bits", "kv_budget"}:
        chunk = ArenaLayout(pinned.layout.layout([FP16], [doc.n_chunks])).context_bytes / doc.n_chunks
        assert sizes.context_bytes <= before.context_bytes + chunk  # both spend one budget but for less than a step
        assert sizes.context_bits_per_value <= options.get("kv_bits", 99)
        assert sizes.nbytes <= 300 * 1024 or "kv_budget" not in options
    assert doc.ask(QUESTION, plan=pinned, max_tokens=2).ids


def test_a_budget_too_small_for_the_pins_says_what_they_need(doc):
    with pytest.raises(PlanError, match=r"kv_bits is 3; expected at least \d\.\d+, .* for all but \d+ pinned chunks"):
        doc.plan(QUESTION, kv_bits=3, pin=["the"])
    with pytest.raises(PlanError, match=r"kv_budget is 100,000 bytes; expected at least [\d,]+, .* pinned chunks"):
        doc.plan(QUESTION, kv_budget=100_000, pin=["the"])


def test_without_a_budget_pins_come_before_the_usual_bits(doc):
    plan = doc.plan(QUESTION, pin=["the"])
    assert "above the usual 3.3" in plan.notes[0]
    assert plan.notes[1].startswith("pinned at FP16: chunks ")


@pytest.mark.parametrize("name", ["fp16", "uniform", "kivi", "atom"])
def test_policies_without_a_choice_refuse_by_name(doc, name):
    options = {"tier": Tier(4, 4)} if name == "uniform" else {}
    with pytest.raises(PlanError, match=f"policy {name} does not choose by chunk"):
        doc.plan(QUESTION, policy=name, pin=["iron pan"], **options)


def test_a_plan_that_was_given_takes_no_pins(doc):
    with pytest.raises(PlanError, match="pin would change nothing"):
        doc.ask(QUESTION, plan=doc.plan(QUESTION, max_tokens=2), pin=["iron pan"])


def test_a_chunk_that_a_window_hides_cannot_be_pinned():
    shape = DocumentShape(n_layers=2, n_kv_heads=1, head_dim=16, chunk=8, n_chunks=10, prefix=0, remainder=0, suffix=4,
                          max_new=4, window=40)
    with pytest.raises(PlanError, match="sliding window of 40 tokens hides all chunks before 5"):
        load_policy("cocktail").pinned([2]).plan(shape, np.arange(10, dtype=np.float32))
