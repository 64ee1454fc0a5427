"""The command line against a stand-in for the API: what it passes on, prints, refuses, and returns."""

from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from fake_model import STATS, FakeModel, FakeStream, make_plan

import cocktail
from cocktail import run
from cocktail.policies.budget import BudgetPolicy
from runtime.errors import PromptError
from runtime.plan import Tier


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setitem(vars(cocktail), "load", fake.load)
    return fake


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the working directory, with what the command line may be given."""
    monkeypatch.chdir(tmp_path)
    Path("model").write_bytes(b"")
    Path("doc.txt").write_text("The pan was mended by Odo Farrant.\n", encoding="utf-8")
    Path("plan.json").write_text(make_plan().to_json())
    Path("pairs.json").write_text('{"version": 1, "pairs": ["K8V4", "K8V4"], "pareto": '
                                  '[{"bits": 3.6, "kl": 0.1, "pairs": ["K4V2", "K3V2"]}]}')
    return tmp_path


ASK = ["model", "--context", "doc.txt", "--query", "Who?"]


def test_answer_goes_to_stdout_and_the_summary_to_stderr(model, files, capsys):
    assert run.main(ASK) == 0
    out, err = capsys.readouterr()
    assert out == "Odo Farrant\n"
    for shown in ("140", "100", "500.0 ms", "20.0 tokens/s", "FP16", "33.3%", "K3V2", "66.7%", "7.50 bits", "25.0%",
                  "3.00 GiB", "5.0 MiB", "cpu: avx2 kernels", "ended by length"):
        assert shown in err


def test_only_given_options_reach_the_api(model, files):
    """So that a default is stated once, in the API, and conflicts between options are found by it."""
    run.main(ASK)
    assert model.options("load") == {"backend": "auto", "threads": None, "graph": True}
    assert model.options("read") == {"system": None, "keep": False}  # for a single question nothing is kept
    asked = model.options("ask")
    assert asked.keys() == {"policy", "sampling", "stop", "stream", "progress"}
    assert vars(asked["policy"]) == vars(BudgetPolicy())
    assert asked["sampling"].temperature == 0.0


@pytest.mark.parametrize(("given", "call", "name", "value"), [
    (["--scorer", "none"], "ask", "scorer.name", "none"),
    (["--scorer", "random", "--seed", "7"], "ask", "scorer.name", "random:7"),
    (["--kv-bits", "3.5"], "ask", "policy.kv_bits", 3.5),
    (["--kv-budget", "200MiB"], "ask", "policy.kv_budget", 200 << 20),
    (["--tiers", "K3V2, fp16"], "ask", "policy.tiers", (Tier(3, 2), Tier(16, 16))),
    (["--tiers", "K3V2,K8V8", "--shares", ".25"], "ask", "policy.shares", (0.25,)),
    (["--policy", "fp16"], "ask", "policy.name", "fp16"),
    (["--policy", "cocktail", "--alpha", "0"], "ask", "policy.alpha", 0.0),
    (["--policy", "cocktail", "--beta", ".2"], "ask", "policy.beta", 0.2),
    (["--policy", "cocktail", "--no-search", "--seed", "7"], "ask", "policy.seed", 7),
    (["--policy", "cocktail", "--no-search"], "ask", "policy.no_search", True),
    (["--policy", "cocktail", "--no-reorder"], "ask", "policy.no_reorder", True),
    (["--policy", "cocktail", "--seed", "7"], "ask", "policy.seed", 0),
    (["--policy", "uniform", "--tier", "K4V2"], "ask", "policy.tier", Tier(4, 2)),
    (["--policy", "kvtuner", "--pairs", "pairs.json"], "ask", "policy.name", "kvtuner"),
    (["--policy", "cocktail", "--pairs", "pairs.json", "--pairs-bits", "4"], "ask", "policy.pairs.pairs",
     (Tier(4, 2), Tier(3, 2))),
    (["--policy", "kivi", "--bits", "2"], "ask", "policy.tier", Tier(2, 2)),
    (["--policy", "kivi", "--residual", "0"], "ask", "policy.residual", 0),
    (["--policy", "atom"], "ask", "policy.tier", Tier(4, 4)),
    (["--policy", "cocktail", "--formats", "kivi"], "ask", "policy.formats.family", "kivi"),
    (["--policy", "uniform", "--tier", "K4V4", "--formats", "atom"], "ask", "policy.formats.family", "atom"),
    (["--sink", "0"], "ask", "policy.sink", 0),
    (["--max-tokens", "5"], "ask", "max_tokens", 5),
    (["--stop", "a", "--stop", "\n"], "ask", "stop", ("a", "\n")),
    (["--plan-in", "plan.json"], "ask", "plan", make_plan()),
    (["--chunk", "64"], "read", "chunk", 64),
    (["--system", "Be brief."], "read", "system", "Be brief."),
    (["--backend", "cpu"], "load", "backend", "cpu"),
    (["--threads", "2"], "load", "threads", 2),
    (["--no-graph"], "load", "graph", False),
])
def test_option_reaches_the_api(model, files, given, call, name, value):
    assert run.main([*ASK, *given]) == 0
    name, *attributes = name.split(".")
    found = model.options(call)[name]
    for attribute in attributes:
        found = getattr(found, attribute)
    assert found == value


def test_sampling_options(model, files):
    run.main([*ASK, "--temperature", ".7", "--top-k", "5", "--top-p", ".9", "--min-p", ".1",
              "--repetition-penalty", "1.1", "--seed", "3"])
    sampling = model.options("ask")["sampling"]
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 5, 0.9)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.1, 1.1, 3)


def test_the_checkpoints_sampling_is_used_when_asked_for_and_overridden_by_options(model, files):
    run.main([*ASK, "--model-sampling", "--top-k", "5"])
    sampling = model.options("ask")["sampling"]
    assert (sampling.temperature, sampling.top_k) == (0.6, 5)


def test_the_checkpoint_is_greedy_without_do_sample(model, files):
    model.config.generation = {"temperature": 0.6}
    run.main([*ASK, "--model-sampling"])
    assert model.options("ask")["sampling"].temperature == 0.0


def test_several_questions_are_answered_as_lines_of_json(model, files, capsys):
    """The document is read once and kept; what is refused has its error in its line, and the others go on."""
    (files / "questions.txt").write_text("Why?\n\n  When?  \n", encoding="utf-8")
    ask, refused = model.ask, iter([None, PromptError("too\nlong"), None])

    def sometimes(*args, **options):
        if (error := next(refused)) is not None:
            raise error
        return ask(*args, **options)
    model.ask = sometimes
    code = run.main(["model", "--context", "doc.txt", "--query", "Who?", "--queries", "questions.txt"])
    out, err = capsys.readouterr()
    first, second, third = (json.loads(line) for line in out.splitlines())
    assert (first["question"], first["answer"], first["finish_reason"]) == ("Who?", "Odo Farrant", "length")
    assert first["stats"] == STATS
    assert second == {"question": "Why?", "error": "too long"}
    assert third["question"] == "When?"
    assert (code, err) == (2, "error: 1 of 3 questions could not be answered; their lines say why\n")
    assert [call for call, *_ in model.calls] == ["load", "read", "ask", "ask"]
    assert model.options("read")["keep"] is True


def test_several_questions_without_statistics_until_ctrl_c(model, files, capsys):
    model.pieces = ["Odo ", KeyboardInterrupt()]
    code = run.main(["model", "--context", "doc.txt", "--query", "Who?", "--query", "Why?", "--stats", "none"])
    out, err = capsys.readouterr()
    assert json.loads(out) == {"question": "Who?", "answer": "Odo ", "finish_reason": "interrupted"}
    assert (code, err) == (130, "")


def test_a_document_is_saved_and_asked_later(model, files, monkeypatch, capsys):
    assert run.main(["model", "--context", "doc.txt", "--save-document", "doc.kv"]) == 0  # no question, no terminal
    assert model.options("read")["keep"] is True
    assert next(args for call, args, _ in model.calls if call == "save")[0] == "doc.kv"
    opened = []
    monkeypatch.setattr(cocktail, "open_document", lambda path, owner: (opened.append((path, owner)), model)[1])
    assert run.main(["model", "--document", "doc.kv", "--query", "Who?"]) == 0
    assert opened == [("doc.kv", model)]
    assert capsys.readouterr().out == "Odo Farrant\n"


def test_stdin_as_context(model, files, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffünï".encode())))
    assert run.main(["model", "--context", "-", "--query", "Who?"]) == 0
    assert next(args for call, args, _ in model.calls if call == "read") == ("ünï",)


def test_stdin_as_query(model, files, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Who?\n")))
    assert run.main(["model", "--context", "doc.txt", "--query", "-"]) == 0
    assert next(args for call, args, _ in model.calls if call == "ask") == ("Who?\n",)


@pytest.mark.parametrize(("given", "prompt", "raw"), [
    (["--prompt", "Once"], "Once", False),
    (["--query", "Once", "--raw"], "Once", True),
    (["--query", "Hi", "--system", "Be brief."],
     [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], False),
])
def test_without_a_context_the_query_is_completed(model, files, given, prompt, raw):
    assert run.main(["model", *given]) == 0
    name, (sent,), options = model.calls[-1]
    assert (name, sent, options["raw"]) == ("generate", prompt, raw)


def test_stats_json_is_one_line_the_last_of_stderr(model, files, capsys):
    assert run.main([*ASK, "--stats", "json", "--show-plan"]) == 0
    out, err = capsys.readouterr()
    assert out == "Odo Farrant\n"
    assert json.loads(err.splitlines()[-1]) == STATS | {"finish_reason": "length"}


def test_quiet_prints_nothing_but_the_answer_and_what_was_asked_for(model, files, capsys):
    run.main([*ASK, "--quiet"])
    assert capsys.readouterr() == ("Odo Farrant\n", "")
    run.main([*ASK, "--quiet", "--stats", "json"])
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_plan_out_is_what_plan_in_reads(model, files):
    run.main([*ASK, "--plan-out", "out.json"])
    run.main([*ASK, "--plan-in", "out.json"])
    assert [options.get("plan") for call, _, options in model.calls if call == "ask"] == [None, make_plan()]


def test_show_plan(model, files, capsys):
    run.main([*ASK, "--show-plan"])
    err = capsys.readouterr().err
    assert make_plan().table() in err
    assert "#::" in err.splitlines()


def test_a_warning_is_one_line(model, files, capsys, monkeypatch):
    monkeypatch.setattr(model, "read", lambda *_, **__: warnings.warn("1 of 3 scores", stacklevel=1) or model)
    assert run.main([*ASK, "--quiet"]) == 0
    assert capsys.readouterr().err == "warning: 1 of 3 scores\n"


def test_interrupted_between_pieces_keeps_the_answer_so_far(model, files, capsys):
    model.pieces = ["Odo ", KeyboardInterrupt(), "Farrant"]
    assert run.main([*ASK, "--stats", "json"]) == 130
    out, err = capsys.readouterr()
    assert out == "Odo \n"
    assert json.loads(err.splitlines()[-1])["finish_reason"] == "interrupted"


def test_an_interrupted_answer_is_not_verified(model, files, monkeypatch):
    verified = []
    monkeypatch.setattr(model, "verify", lambda *given: verified.append(given), raising=False)
    assert run.main([*ASK, "--verify", "--stats", "none"]) == 0
    assert [query for query, *_ in verified] == ["Who?"]
    model.pieces = ["Odo ", KeyboardInterrupt(), "Farrant"]
    assert run.main([*ASK, "--verify", "--stats", "none"]) == 130
    assert len(verified) == 1


def test_interrupted_while_chunks_are_scored(model, files, capsys, monkeypatch):
    monkeypatch.setattr(model, "ask", lambda *_, **__: FakeStream([KeyboardInterrupt()], plan=None))
    assert run.main([*ASK, "--stats", "json"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_interrupted_while_loading(model, files, monkeypatch, capsys):
    def load(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(cocktail), "load", load)
    assert run.main(ASK) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_an_error_of_the_api_is_one_line(model, files, capsys):
    model.pieces = ["Odo ", PromptError("too long:\n9 tokens")]
    assert run.main(ASK) == 2
    assert capsys.readouterr().err == "error: too long: 9 tokens\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("cocktail-kv ")


def test_the_summary_names_kernels_where_they_differ():
    from cocktail.summary import _kernels

    assert _kernels({"embed": "embed_avx2", "copy_tail": "copy_tail_avx2"}) == "avx2 kernels"
    assert _kernels({"embed": "embed [sm_90]", "qkv": "gemv [sm_90]"}) == "embed [sm_90], gemv [sm_90]"
