"""--verify promote: the budget rises until the bound holds, no further, and the cost is told."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from tiny_model import HANDBOOK

import cocktail
from cocktail import run
from cocktail.promote import STEP, promote
from runtime.errors import PlanError

TEXT = HANDBOOK[:5000]
QUESTION = "Who mended the cracked iron pan?"


@pytest.fixture(scope="module")
def doc(path):
    return cocktail.load(path, backend="cpu", threads=1).read(TEXT)


@pytest.mark.parametrize("options", [{}, {"scorer": "attention"}, {"pin": ["iron pan"]}], ids=str)
def test_the_bound_holds_and_held_nowhere_before(doc, options):
    first = doc.verify(QUESTION, doc.ask(QUESTION, kv_bits=4, max_tokens=12, **options)).mean_kl
    found = promote(doc, QUESTION, kl=first / 20, kv_bits=4, max_tokens=12, **options)
    assert found.verification.mean_kl <= first / 20
    assert len(found.steps) > 1
    assert found.steps[0].kl == first
    assert all(step.kl > first / 20 for step in found.steps[:-1])
    assert all(low.bits < high.bits <= low.bits * STEP and low.cache_bytes < high.cache_bytes
               for low, high in pairwise(found.steps))
    assert found.steps[-1].cache_bytes == found.answer.stats.cache_bytes
    assert found.verification.kl == doc.verify(QUESTION, found.answer).kl


def test_chunks_rise_along_the_budgets_path(doc):
    plans = [promote(doc, QUESTION, kl=kl, kv_bits=4, max_tokens=12).answer.plan for kl in (9.0, 1e-4)]
    for low, high in zip(*(plan.assignment for plan in plans), strict=True):
        for chunk in range(doc.n_chunks):
            before, after = plans[0].layout.tiers[low[chunk]], plans[1].layout.tiers[high[chunk]]
            assert after.k_bits >= before.k_bits
            assert after.v_bits >= before.v_bits


def test_a_bound_of_nothing_ends_at_fp16(doc):
    found = promote(doc, QUESTION, kl=0, kv_bits=8, max_tokens=6)
    assert found.verification.worst_kl == 0
    assert str(found.answer.plan.layout.tiers[0]) == "FP16"


def test_what_has_nothing_to_raise_is_refused(doc):
    with pytest.raises(PlanError, match="policy cocktail has no budget to raise"):
        promote(doc, QUESTION, policy="cocktail")
    with pytest.raises(PlanError, match="policy budget has no budget to raise"):
        promote(doc, QUESTION, tiers="K2V2,K8V8", shares=".1")
    with pytest.raises(PlanError, match="the bound on KL is nan"):
        promote(doc, QUESTION, kl=float("nan"))
    with pytest.raises(PlanError, match=r"the mean KL is .*has no higher tier to go to"):
        promote(doc, QUESTION, kl=0, tiers="K3V2,K4V4", max_tokens=6)


def test_the_command_line_prints_the_last_answer_alone(path, doc, tmp_path, capsys):
    (tmp_path / "doc.txt").write_text(TEXT, encoding="utf-8")
    line = [str(path), "--context", str(tmp_path / "doc.txt"), "--query", QUESTION, "--max-tokens", "9",
            "--backend", "cpu", "--threads", "1", "--verify", "promote"]
    found = promote(doc, QUESTION, kl=1e-4, max_tokens=9)
    assert len(found.steps) > 1
    assert run.main([*line, "--verify-kl", "0.0001", "--stats", "json"]) == 0
    out, err = capsys.readouterr()
    assert out == found.answer.text + "\n"
    stats = json.loads(err.splitlines()[-1])
    assert stats["promotion"]["steps"] == found.to_dict()["steps"]
    assert stats["verification"]["mean_kl"] == found.verification.mean_kl <= 1e-4
    assert run.main([*line, "--verify-kl", "0.0001"]) == 0
    assert f"bits per value in {len(found.steps)} answers" in capsys.readouterr().err
    assert run.main([*line, "--verify-kl", "100"]) == 0
    assert "promoted nothing: the bound held" in capsys.readouterr().err
