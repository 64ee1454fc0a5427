"""--dry-run: what it says is what an answer then takes, and no weights are read for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_model import HANDBOOK, save_tiny_model

import cocktail
from cocktail import estimate as estimating
from cocktail import run
from cocktail.cli.dry_run import table
from cocktail.estimate import Estimate, estimate, outline
from cocktail.policies.pairs import fingerprint
from runtime.arena import ArenaLayout
from runtime.errors import CheckpointError, PlanError
from runtime.plan import Plan

TEXT = HANDBOOK[:5000]
QUESTION = "Who mended the cracked iron pan?"


@pytest.fixture(scope="module")
def model(path):
    return outline(path, "cpu", 1)


@pytest.fixture(scope="module")
def doc(model):
    return model.read(TEXT, keep=False)


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*_):
        raise AssertionError("weights are read")
    monkeypatch.setattr(estimating, "load_weights", refuse)


@pytest.mark.parametrize("options", [{}, {"kv_bits": 5.0}, {"policy": "cocktail"}, {"policy": "kivi"},
                                     {"scorer": "attention"}], ids=str)
def test_what_is_said_is_what_an_answer_takes(path, model, doc, no_weights, options):
    found = estimate(model, doc, QUESTION, {**options, "max_tokens": 9})
    loaded = cocktail.load(path, backend="cpu", threads=1)
    answer = loaded.read(TEXT).ask(QUESTION, max_tokens=9, **options)
    assert found.cache_bytes == answer.stats.cache_bytes
    assert found.cache_fp16_bytes == answer.stats.cache_fp16_bytes
    assert found.context_bits_per_value == answer.stats.context_bits_per_value
    assert found.weights_bytes == answer.stats.weights_bytes
    assert found.plan == (None if "scorer" in options else answer.plan)
    assert found.total_bytes == found.weights_bytes + found.cache_bytes + found.prefill_bytes


def test_a_token_reads_weights_and_what_the_cache_holds_by_then(model, doc):
    found = estimate(model, doc, QUESTION, {"max_tokens": 100})
    shorter = estimate(model, doc, QUESTION, {"max_tokens": 1})
    assert found.cache_bytes > shorter.cache_bytes
    assert abs(found.step_bytes - shorter.step_bytes) < 1000  # positions and padding of the longer tail
    assert found.step_bytes < found.weights_bytes + found.cache_bytes
    assert found.tpot_floor_s == found.step_bytes / found.read_rate


def test_an_embedding_that_is_not_the_head_is_not_read(tmp_path):
    untied = outline(save_tiny_model(tmp_path, tie_word_embeddings=False), "cpu", 1)
    assert untied.weights_bytes - untied.step_bytes == 400 * 64 * 4  # float32 rows of the vocabulary


def test_a_plan_is_checked_against_the_document(model, doc):
    plan = doc.plan(QUESTION, max_tokens=9)
    assert estimate(model, doc, QUESTION, {"plan": plan}).plan == plan
    with pytest.raises(PlanError, match="does not fit"):
        estimate(model, model.read(TEXT[:3000], keep=False), QUESTION, {"plan": plan})


def test_weights_are_read_where_a_policy_asks_for_them(path, tmp_path):
    model = outline(path, "cpu", 1)
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps({"version": 1, "pairs": ["K4V2", "K4V2"], "model": {"fingerprint": "another"}}))
    with pytest.raises(PlanError, match="fingerprint"):
        estimate(model, model.read(TEXT, keep=False), QUESTION, {"policy": "kvtuner", "pairs": str(pairs)})
    assert model.engine.weights.digest == cocktail.load(path, backend="cpu", threads=1).engine.weights.digest


def test_weights_that_are_read_on_the_way_do_not_count_twice(path, tmp_path, monkeypatch):
    """On a GPU they take of what is free."""
    model, pairs = outline(path, "cpu", 1), tmp_path / "pairs.json"
    found = {"fingerprint": fingerprint(cocktail.load(path, backend="cpu", threads=1).engine)}
    pairs.write_text(json.dumps({"version": 1, "pairs": ["K4V2", "K4V2"], "model": found}))
    read = vars(model.engine.weights)
    monkeypatch.setattr(model.backend, "free_bytes", lambda: 10**9 - model.weights_bytes * ("layers" in read))
    doc = model.read(TEXT, keep=False)
    assert estimate(model, doc, QUESTION, {"policy": "kvtuner", "pairs": str(pairs)}).free_bytes == 10**9
    assert "layers" in read


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        outline(tmp_path / "missing.safetensors")


@pytest.fixture
def line(path, tmp_path, monkeypatch):
    (tmp_path / "doc.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return [str(path), "--context", "doc.txt", "--query", QUESTION, "--backend", "cpu", "--threads", "1", "--dry-run"]


def test_the_command_line_prints_plan_bytes_and_floor(line, doc, no_weights, capsys):
    assert run.main([*line, "--max-tokens", "9", "--plan-out", "plan.json", "--report", "out.html"]) == 0
    out = capsys.readouterr().out
    plan = Plan.from_json(Path("plan.json").read_text())
    assert plan == doc.plan(QUESTION, max_tokens=9)
    assert plan.table() in out
    assert f"{ArenaLayout(plan.layout).context_bits_per_value:.2f} bits per context value" in out
    for shown in ("weights", "in all", "fits: ", "a token", "GB/s"):
        assert shown in out
    assert QUESTION in Path("out.html").read_text()


def test_one_line_of_json(line, no_weights, capsys):
    assert run.main([*line, "--stats", "json"]) == 0
    (out,) = capsys.readouterr().out.splitlines()
    assert json.loads(out)["tpot_floor_s"] > 0


def test_attention_knows_the_bytes_but_not_the_plan(line, no_weights, capsys):
    assert run.main([*line, "--scorer", "attention"]) == 0
    assert "known once the prompt is read" in capsys.readouterr().out
    assert run.main([*line, "--scorer", "attention", "--plan-out", "other.json"]) == 2
    assert "other.json cannot be written: which chunk gets what depends" in capsys.readouterr().err


@pytest.mark.parametrize(("free", "shown"), [(10_000, "DOES NOT FIT: 0.0 MiB free"), (None, "does not say")])
def test_what_does_not_fit_is_said(doc, free, shown):
    found = Estimate(doc.plan(QUESTION, max_tokens=9).layout, None, 1 << 20, 1 << 20, 1 << 20, free, None, "cpu")
    assert shown in table(found)
    assert "a token" not in table(found)
