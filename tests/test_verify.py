"""Verification: an answer's figures against the FP16 cache are bench.quality's, and mean what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_model import save_tiny_model

from bench.prompts import Prompt
from bench.quality_measure import ANSWER_TOKENS, measure
from bench.quality_settings import FP16, budget
from cocktail import run, summary
from cocktail.verify import Verification, agreement, divergence, log_softmax
from runtime.errors import PlanError, PromptError

TEXT = (Path(__file__).parents[1] / "examples/handbook.txt").read_text(encoding="ascii", errors="ignore")[:5000]
QUESTION = "Who mended the cracked iron pan?"


@pytest.fixture(scope="module")
def doc(model):
    return model.read(TEXT)


def test_the_figures_are_those_of_bench_quality(model, doc):
    prompt = Prompt("literal", TEXT, QUESTION, "", "Odo Farrant", None)
    sample = measure(model, prompt, [FP16, budget(3.3, "bm25")], {}, 0)["budget@3.3/bm25"]
    exact = doc.ask(QUESTION, policy="fp16", max_tokens=ANSWER_TOKENS)
    mixed = replace(exact, plan=doc.plan(QUESTION, kv_bits=3.3, max_tokens=ANSWER_TOKENS))
    found = doc.verify(QUESTION, mixed)
    assert found.kl == sample.kl
    assert found.agree == sample.agree
    assert 0 < found.mean_kl < found.worst_kl


def test_every_token_but_the_first_is_compared(doc):
    answer = doc.ask(QUESTION, kv_bits=3, max_tokens=40)
    found = doc.verify(QUESTION, answer)
    plans = {"fp16": doc.plan(QUESTION, policy="fp16", max_tokens=40), "mixed": answer.plan}
    compared = doc.compare(QUESTION, plans, answer_ids=answer.ids, max_tokens=1)
    p, q = (log_softmax(compared[name].logits[1:]) for name in plans)
    np.testing.assert_allclose(found.kl, divergence(p, q), rtol=1e-3, atol=1e-6)
    assert found.agree == tuple(agreement(p, q).tolist())
    assert len(found.kl) == len(answer.ids) - 1
    assert found.worst_kl == found.kl[found.worst_token - 1]
    assert found.seconds > 0


def test_an_exact_answer_differs_in_nothing(doc):
    found = doc.verify(QUESTION, doc.ask(QUESTION, policy="fp16", max_tokens=12))
    assert (found.agreement, found.mean_kl, found.worst_kl) == (1, 0, 0)


def test_a_plan_of_the_models_own_attention_is_verified_as_it_was_followed(doc):
    answer = doc.ask(QUESTION, scorer="attention", kv_bits=3, max_tokens=8)
    assert doc.verify(QUESTION, answer).mean_kl > 0


def test_a_single_token_says_nothing(doc):
    found = doc.verify(QUESTION, doc.ask(QUESTION, max_tokens=1))
    assert (found.agreement, found.mean_kl, found.worst_kl, found.worst_token) == (None,) * 4
    assert json.loads(json.dumps(found.to_dict()))["tokens"] == 0


def test_misuse_is_refused(doc, model):
    answer = doc.ask(QUESTION, max_tokens=4)
    with pytest.raises(PlanError):
        model.read(TEXT + TEXT[:200]).verify(QUESTION, answer)
    with pytest.raises(PromptError, match="0 ids"):
        doc.verify(QUESTION, replace(answer, ids=()))


def test_what_the_command_line_says(model, doc, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc.txt").write_text(TEXT)
    path = save_tiny_model(tmp_path)
    line = [str(path), "--context", "doc.txt", "--query", QUESTION, "--backend", "cpu", "--threads", "1", "--verify"]
    expected = doc.verify(QUESTION, doc.ask(QUESTION, max_tokens=9))
    assert run.main([*line, "--max-tokens", "9", "--stats", "json"]) == 0
    shown = json.loads(capsys.readouterr().err.splitlines()[-1])["verification"]
    assert {name: value for name, value in shown.items() if name != "seconds"} == {
        name: value for name, value in expected.to_dict().items() if name != "seconds"}
    assert run.main([*line, "--max-tokens", "1"]) == 0
    assert "verified nothing: the only token" in capsys.readouterr().err


def test_every_answer_of_several_questions_is_verified(doc, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc.txt").write_text(TEXT)
    asked = (QUESTION, "What is the name of the ferry?")
    assert run.main([str(save_tiny_model(tmp_path)), "--context", "doc.txt", "--backend", "cpu", "--threads", "1",
                     "--max-tokens", "6", "--verify", "--report", "out.html",
                     *(part for query in asked for part in ("--query", query))]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for query, line in zip(asked, lines, strict=True):
        assert line["verification"]["mean_kl"] == doc.verify(query, doc.ask(query, max_tokens=6)).mean_kl
    assert Path("out.html").read_text().count("Verified: ") == 2


def test_the_table_names_the_worst_token(doc):
    found = Verification((0.0, 0.25, 0.05), (True, False, True), 1.5)
    text = summary.table(doc.ask(QUESTION, max_tokens=2), found)
    assert ("verified 66.7% of 3 tokens have the FP16 cache's top token; KL to it 0.1000 on average, 0.2500 at token 2 "
            "(1.50 s)") in text
