"""The command line on a tiny random model: the whole way from files to an answer, on the CPU."""

from __future__ import annotations

import html
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_backend import NumpyBackend
from tiny_model import save_tiny_model

import cocktail
from cocktail import run
from cocktail.policies.pairs import fingerprint
from runtime.arena import ArenaLayout
from runtime.checkpoint import Checkpoint
from runtime.engine import read
from runtime.model import Model as Engine
from runtime.plan import Plan
from runtime.weights import load_weights

ROOT = Path(__file__).parents[1]
QUESTION = "Who mended the cracked iron pan?"
LOSSES = {side: {"2": [1, 0.1], "3": [0.3, 0.03], "4": [0.1, 0.01], "8": [1e-3, 1e-4]} for side in "KV"}
CONTEXT = (ROOT / "examples/handbook.txt").read_text(encoding="utf-8")[:6000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "chat.safetensors")
    save_tiny_model(folder, "plain.safetensors", template=None)
    (folder / "doc.txt").write_text(CONTEXT, encoding="utf-8")
    (folder / "pairs.json").write_text(json.dumps({"version": 1, "pairs": ["K4V2", "K2V3"], "losses": LOSSES}))
    return folder


@pytest.fixture
def cli(folder, monkeypatch, capsys):
    """Runs the command line: (exit code, stdout, stderr), or with stats=True the statistics instead of stderr."""
    monkeypatch.chdir(folder)

    def call(*arguments: str, stats: bool = False) -> tuple[int, str, Any]:
        code = run.main([*arguments, "--backend", "cpu", "--threads", "1", *(["--stats", "json"] if stats else [])])
        out, err = capsys.readouterr()
        return code, out, json.loads(err.splitlines()[-1]) if stats else err

    return call


ASK = ("chat.safetensors", "--context", "doc.txt", "--query", QUESTION, "--max-tokens", "12")


@pytest.fixture(scope="module")
def document(folder):
    return cocktail.load(folder / "chat.safetensors", backend="cpu", threads=1).read(CONTEXT, keep=False)


def test_the_command_line_and_the_api_agree(cli, document):
    code, out, stats = cli(*ASK, stats=True)
    answer = document.ask(QUESTION, max_tokens=12)
    assert code == 0
    assert out.rstrip("\n") == answer.text.rstrip("\n")
    expected = answer.stats.to_dict() | {"finish_reason": answer.finish_reason}
    assert stats.keys() == expected.keys()
    same = {name for name in stats if not name.endswith("_s")} - {"peak_memory_bytes"}
    assert {name: stats[name] for name in same} == {name: expected[name] for name in same}


def test_a_document_is_read_once_for_many_questions_and_saved_for_others(cli, document, folder):
    queries = [QUESTION, "What is said about the ferry?", "Who keeps the keys?"]
    (folder / "questions.txt").write_text("\n".join(queries[1:]), encoding="utf-8")
    expected = [document.ask(query, max_tokens=12).text for query in queries]
    code, out, err = cli(*ASK, "--queries", "questions.txt", "--save-document", "doc.kv")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [line["question"] for line in lines] == queries
    assert [line["answer"] for line in lines] == expected
    known = len(document.prefix_ids) + len(document.context_ids)
    assert [line["stats"]["reused_tokens"] for line in lines] == [known] * 3  # it was read to be saved
    code, out, stats = cli("chat.safetensors", "--document", "doc.kv", "--query", queries[2], "--max-tokens", "12",
                           stats=True)
    assert (code, out.rstrip("\n"), stats["reused_tokens"]) == (0, expected[2].rstrip("\n"), known)


def test_statistics_are_those_of_the_run(cli, document):
    _, _, stats = cli(*ASK, stats=True)
    sizes = ArenaLayout(document.plan(QUESTION, max_tokens=12).layout)
    assert stats["cache_bytes"] == sizes.nbytes
    assert stats["cache_bytes"] < stats["cache_fp16_bytes"]
    assert sum(stats["chunks"].values()) == document.n_chunks
    assert len(stats["chunks"]) > 2
    assert stats["context_tokens"] == len(document.context_ids)
    assert stats["prompt_tokens"] == len(document.prompt(QUESTION))
    assert stats["generated_tokens"] == 12
    assert stats["finish_reason"] == "length"
    assert stats["backend"] == "cpu"
    assert stats["kernels"].keys() == document.model.backend.kernels().keys() - {"attention_mass"}
    assert stats["kernels"]
    assert 0 < stats["pack_s"] < stats["prefill_s"] < stats["ttft_s"]
    assert stats["tpot_s"] > 0
    assert stats["peak_memory_bytes"] > stats["weights_bytes"] > 0


def test_the_summary_names_every_tier(cli):
    _, _, err = cli(*ASK, "--show-plan")
    for shown in ("K8V4", "K4V3", "K4V2", "K2V2", "bits per value", "TTFT", "TPOT", "chunks, in document order"):
        assert shown in err


def test_a_report_shows_the_answer(cli, folder):
    code, out, _ = cli(*ASK, "--report", "out.html")
    text = html.unescape(re.sub("<[^>]*>", "", (folder / "out.html").read_text(encoding="utf-8")))
    assert code == 0
    for shown in (CONTEXT, QUESTION, out.rstrip("\n")):
        assert shown in text


def test_a_plan_survives_the_way_through_a_file(cli, folder):
    _, first, _ = cli(*ASK, "--policy", "cocktail", "--plan-out", "plan.json")
    plan = Plan.from_json((folder / "plan.json").read_text())
    assert plan.policy == "cocktail"
    code, second, stats = cli(*ASK, "--plan-in", "plan.json", stats=True)
    assert code == 0
    assert second == first
    assert (stats["policy"], stats["scorer"]) == ("cocktail", "bm25")


@pytest.mark.parametrize("options", [
    ("--policy", "fp16"), ("--policy", "cocktail", "--sink", "0"), ("--kv-bits", "5"), ("--kv-budget", "0.5MiB"),
    ("--tiers", "K3V2,K4V4", "--shares", ".2"), ("--scorer", "random", "--seed", "3"), ("--scorer", "none"),
    ("--policy", "uniform", "--tier", "K4V2"), ("--policy", "kvtuner", "--pairs", "pairs.json"),
    ("--policy", "cocktail", "--pairs", "pairs.json", "--no-search", "--no-reorder"), ("--pairs", "pairs.json"),
    ("--chunk", "64"), ("--system", "Be brief."),
    ("--temperature", ".8", "--top-k", "20", "--top-p", ".9", "--min-p", ".01", "--repetition-penalty", "1.2"),
], ids=" ".join)
def test_options_run(cli, options):
    code, _, stats = cli(*ASK, *options, stats=True)
    assert code == 0
    assert stats["generated_tokens"] > 0


@pytest.mark.parametrize(("policy", "options"), [
    ("fp16", {}), ("uniform", {"tier": "K3V2"}), ("uniform", {"tier": "K8V8"}), ("kvtuner", {"pairs": True}),
    ("cocktail", {}), ("cocktail", {"no_search": True}), ("cocktail", {"no_reorder": True, "pairs": True}),
    ("budget", {"kv_bits": 3.3}), ("budget", {"kv_bits": 4.5, "pairs": True})], ids=str)
def test_every_policys_logits_are_those_of_attention_in_float64_over_decoded_values(folder, document, policy, options):
    """Up to a few codes: the oracle's prefill rounds some K and V to the other side. Without quantizing, or done
    otherwise, the difference is many times as large."""
    given = options | ({"pairs": folder / "pairs.json"} if "pairs" in options else {})
    plan, exact = (document.plan(QUESTION, policy=name, max_tokens=8, **more)
                   for name, more in ((policy, given), ("fp16", {})))
    with Checkpoint.open(folder / "chat.safetensors") as checkpoint:
        oracle = Engine(checkpoint.config, load_weights(checkpoint, NumpyBackend()), NumpyBackend())
    prompt, answer = document.prompt(QUESTION), document.ask(QUESTION, plan=exact).ids
    reading = read(oracle, prompt, [plan, exact])
    expected, unquantized = reading.force(answer, 0), reading.force(answer, 1)
    error, effect = document.logits(QUESTION, answer, plan=plan) - expected, unquantized - expected
    if policy == "fp16":
        assert np.abs(error).max() < 2e-3
    else:
        assert np.linalg.norm(error) < 0.05 * np.linalg.norm(effect)


def test_in_place_the_answer_stays(document):
    """Moving a chunk changes the order of a sum, nothing else."""
    plan = document.plan(QUESTION, policy="cocktail", max_tokens=12)
    placed = document.plan(QUESTION, policy="cocktail", max_tokens=12, no_reorder=True)
    assert placed.assignment == plan.assignment
    found = document.compare(QUESTION, {"fp16": document.plan(QUESTION, policy="fp16", max_tokens=12), "plan": plan,
                                        "placed": placed}, max_tokens=12)
    np.testing.assert_allclose(found["placed"].logits, found["plan"].logits, atol=1e-3)
    assert np.abs(found["placed"].logits - found["fp16"].logits).max() > 1e-2


def test_pairs_that_record_another_model_are_refused(cli, folder, document):
    engine = document.model.engine
    data = {"version": 1, "pairs": ["K4V2", "K2V3"], "losses": LOSSES, "model": {"fingerprint": fingerprint(engine)}}
    (folder / "own.json").write_text(json.dumps(data))
    (folder / "other.json").write_text(json.dumps(data | {"model": {"fingerprint": "0" * 16}}))
    for policy in ("kvtuner", "cocktail", "budget"):
        assert cli(*ASK, "--policy", policy, "--pairs", "own.json")[0] == 0
        code, out, err = cli(*ASK, "--policy", policy, "--pairs", "other.json")
        assert (code, out) == (2, "") and "fingerprint '0000000000000000'" in err


def test_the_fingerprint_is_the_models_and_no_backends(folder, document):
    engine = document.model.engine
    assert fingerprint(engine) == fingerprint(engine)
    with Checkpoint.open(folder / "chat.safetensors") as checkpoint:
        oracle = Engine(checkpoint.config, load_weights(checkpoint, NumpyBackend()), NumpyBackend())
        assert fingerprint(oracle) == fingerprint(engine)
        embed = oracle.weights.embed.copy()
        embed[-1, 0] += 1
        other = replace(oracle, weights=replace(oracle.weights, embed=embed))
        assert fingerprint(other) != fingerprint(engine)
        oracle.weights.layers[1].mlp_norm[3] += 1
        assert fingerprint(oracle) != fingerprint(engine)


def test_a_byte_budget_is_kept(cli):
    _, _, stats = cli(*ASK, "--kv-budget", "600KiB", stats=True)
    assert 0.9 * 600 * 2**10 < stats["cache_bytes"] <= 600 * 2**10


def test_sampling_is_seeded(cli):
    texts = [cli(*ASK, "--temperature", "2", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_answer_before_it(cli):
    _, whole, _ = cli(*ASK)
    stop = whole[len(whole) // 2 :][:3]
    _, text, stats = cli(*ASK, "--stop", stop, stats=True)
    assert text.rstrip("\n") == whole[: whole.index(stop)].rstrip("\n")
    assert stats["finish_reason"] == "stop"


def test_completion_without_a_context(cli, document):
    _, out, stats = cli("chat.safetensors", "--query", "Hello", "--max-tokens", "5", stats=True)
    assert out.rstrip("\n") == document.model.generate("Hello", max_tokens=5).text.rstrip("\n")
    assert stats["chunks"] == {}
    _, raw, _ = cli("chat.safetensors", "--query", "Hello", "--raw", "--max-tokens", "5")
    _, plain, _ = cli("plain.safetensors", "--query", "Hello", "--max-tokens", "5")
    assert raw == plain != out  # the two checkpoints differ in nothing but the template


def test_an_empty_question_continues_the_document(cli):
    code, _, stats = cli("plain.safetensors", "--context", "doc.txt", "--query", "", "--max-tokens", "5", stats=True)
    assert code == 0
    assert stats["generated_tokens"] == 5


@pytest.mark.parametrize(("options", "message"), [
    (("--kv-bits", "1"), "expected at least"),
    (("--kv-budget", "1KB"), "expected at least"),
    (("--chunk", "12"), "expected a multiple of 8"),
    (("--max-tokens", "8000"), "positions"),
    (("--scorer", "nowhere/encoder"), "nowhere/encoder"),
])
def test_what_does_not_fit_is_one_line(cli, options, message):
    code, out, err = cli(*ASK, *options)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert message in err


def test_a_plan_for_another_document_is_refused(cli, folder):
    cli(*ASK, "--plan-out", "plan.json")
    (folder / "short.txt").write_text(CONTEXT[:3000], encoding="utf-8")
    code, _, err = cli("chat.safetensors", "--context", "short.txt", "--query", QUESTION, "--plan-in", "plan.json")
    assert code == 2
    assert re.fullmatch(r"error: [^\n]+\n", err)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "folder"])
def test_a_model_that_is_none_is_one_line(cli, folder, damage):
    model = folder / damage
    if damage == "folder":
        model.mkdir()
    elif damage != "missing":
        good = (folder / "chat.safetensors").read_bytes()
        model.write_bytes({"empty": b"", "truncated": good[:-100], "text": CONTEXT.encode()}[damage])
    code, out, err = cli(str(model), "--query", "Hello")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert damage in err


def heed_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored, and Python children keep that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_control_c_keeps_what_was_generated(folder):
    arguments = [str(folder / "plain.safetensors"), "--query", "Once", "--max-tokens", "8000", "--backend", "cpu",
                 "--threads", "1", "--stats", "json"]
    process = subprocess.Popen([sys.executable, "-m", "cocktail.run", *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=heed_interrupts)
    begin = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    stats = json.loads(err.decode().splitlines()[-1])
    assert stats["finish_reason"] == "interrupted"
    assert 0 < stats["generated_tokens"] < 8000
    assert (begin + rest).endswith(b"\n")
    assert len(err.splitlines()) == 1
