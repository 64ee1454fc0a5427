"""Several questions of one command: answered together where that can be, as one after another to the last bit."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_terminal import in_terminal
from tiny_model import HANDBOOK, save_tiny_model

import cocktail
from cocktail import run
from cocktail.cli import questions
from cocktail.cli.options import parser
from cocktail.summary import ProgressBars
from runtime import batch

QUERIES = ("Who mended the pan?", "When?", "Where does the ledger lie?", "What is iron?", "Who keeps the keys?")
ASK = ["tiny.safetensors", "--context", "doc.txt", "--queries", "questions.txt", "--threads", "1", "--backend", "cpu"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, dtype in (("tiny.safetensors", np.float32), ("half.safetensors", np.float16)):
        save_tiny_model(folder, name, dtype=dtype)
    (folder / "doc.txt").write_text(HANDBOOK[:3000], encoding="utf-8")
    (folder / "questions.txt").write_text("\n".join(QUERIES), encoding="utf-8")
    return folder


@pytest.fixture
def files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(files: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a command gets, whichever it loads."""
    return loaded(monkeypatch, "tiny.safetensors")


def loaded(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    model = cocktail.load(name, backend="cpu", threads=1)
    monkeypatch.setitem(vars(cocktail), "load", lambda *_, **__: model)
    return model


def lines_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return line | {"stats": {name: value for name, value in line.get("stats", {}).items()
                             if not name.endswith("_s") and name != "peak_memory_bytes"}}


@pytest.mark.parametrize(("name", "given"), [
    ("tiny.safetensors", ["--kv-bits", "4"]),
    ("half.safetensors", ["--policy", "cocktail", "--temperature", "1", "--seed", "3"])])
def test_answers_are_those_of_each_question_alone_to_the_last_bit(files, monkeypatch, capsys, name, given):
    """One of six is refused; four may be under way, so that others join those that run."""
    model = loaded(monkeypatch, name)
    (files / "six.txt").write_text("\n".join((*QUERIES[:2], "too long " * 9000, *QUERIES[2:])), encoding="utf-8")
    monkeypatch.setattr(questions, "AHEAD", 4)
    drawn: dict[str, dict[int, list[bytes]]] = {"together": {}, "alone": {}}  # the logits of every id, by answer
    sample, together = model.backend.sample, Counter()

    def spied(logits, draws, state):
        drawn[way].setdefault(draws.ids.ctypes.data, []).append(np.array(logits).tobytes())
        kept.append(draws)  # or another would come to lie in its place
        sample(logits, draws, state)

    step = batch.Batch.step
    monkeypatch.setattr(batch.Batch, "step", lambda self: (together.update([len(self.members)]), step(self))[1])
    monkeypatch.setattr(model.backend, "sample", spied)
    kept: list[Any] = []
    way = "together"
    command = [name, *ASK[1:], "--queries", "six.txt", "--max-tokens", "40", *given]
    code = run.main(command)
    out, err = capsys.readouterr()
    assert (code, err) == (2, "error: 1 of 6 questions could not be answered; their lines say why\n")
    assert max(together) > 1, "nothing was decoded together"

    way = "alone"
    monkeypatch.setattr(model.backend, "free_bytes", lambda: None)  # so that they are asked one after another
    assert run.main(command) == 2
    expected, found = lines_of(capsys.readouterr().out), lines_of(out)
    assert [list(line) for line in found] == [list(line) for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert without_times(line) == without_times(other)
    assert "8192 positions" in found[2]["error"]
    assert found[-1]["stats"]["reused_tokens"] > 0, "the document was read again"
    assert len(drawn["alone"]) == 5
    assert Counter(map(tuple, drawn["together"].values())) == Counter(map(tuple, drawn["alone"].values()))


@pytest.mark.parametrize("why", ["--verify", "--report", "unknown", "room for the weights",
                                 "room for little besides"])
def test_what_needs_answers_of_its_own_gets_them_one_after_another(model, capsys, monkeypatch, why):
    assert run.main([*ASK, "--max-tokens", "4", "--stats", "none"]) == 0
    expected = lines_of(capsys.readouterr().out)
    free = {"unknown": None, "room for the weights": model.weights_bytes,
            "room for little besides": model.weights_bytes + 20_000}
    if why in free:
        monkeypatch.setattr(model.backend, "free_bytes", lambda: free[why])
    monkeypatch.setattr(batch.Batch, "step", lambda _: pytest.fail("decoded together"))
    given = {"--verify": ["--verify"], "--report": ["--report", "out.html"]}.get(why, [])
    assert run.main([*ASK, "--max-tokens", "4", "--stats", "none", *given]) == 0
    found = lines_of(capsys.readouterr().out)
    assert all(("verification" in line) == (why == "--verify") for line in found)
    assert [{name: line[name] for name in ("question", "answer", "finish_reason")} for line in found] == expected


def test_a_line_comes_once_its_question_and_all_before_it_are_done(model, monkeypatch):
    """The last chunks are scored when the first line is there: a command that waited for all answers would hang."""
    shown = io.StringIO()

    class Gate:
        name = "gate"

        def score(self, chunks, query):
            until = time.monotonic() + 20
            while query == QUERIES[-1] and shown.getvalue().count("\n") < len(QUERIES) - 1:
                assert time.monotonic() < until
                time.sleep(0.002)
            return np.zeros(len(chunks), np.float32)

    monkeypatch.setattr(sys, "stdout", shown)
    options = parser().parse_args([*ASK, "--stats", "none"])
    assert questions.questions(model.read(HANDBOOK[:3000]), options, QUERIES, {"scorer": Gate(), "max_tokens": 4}) == 0
    assert [line["question"] for line in lines_of(shown.getvalue())] == list(QUERIES)


def test_after_ctrl_c_what_is_complete_is_written_and_the_rest_is_cancelled(model, capsys):
    """The second answer ends at a stop string that the first never has; Ctrl-C comes between the two ends."""
    doc = model.read(HANDBOOK[:3000])
    endless, other = (doc.ask(query, policy="fp16", max_tokens=1000).text for query in QUERIES[:2])
    stop = next(other[at : at + 4] for at in range(5, 60) if other[at : at + 4] not in endless)
    until = time.monotonic() + 20
    ended = []

    def interrupt():
        while not (scheduler := model._scheduler) or scheduler.stats().completed == 0:
            if time.monotonic() > until:
                return
            time.sleep(0.001)
        ended.append(scheduler)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        code = run.main([*ASK[:3], "--query", QUERIES[0], "--query", QUERIES[1], "--stop", stop, "--policy", "fp16",
                         "--max-tokens", "6000"])
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert (code, err) == (130, "interrupted\n")
    assert [(line["question"], line["finish_reason"]) for line in lines_of(out)] == [(QUERIES[1], "stop")]
    assert ended[0].closed
    assert (ended[0].stats().cancelled, ended[0].stats().bytes) == (1, 0)


def test_each_request_has_a_bar_on_a_terminal_and_the_lines_go_to_stdout(files):
    """stderr is a terminal, stdout a file: none of its lines may be taken to the terminal, and no bar to the file."""
    (files / "odd.txt").write_text("What is [b]?\n" + "and " * 50 + "\nWho?", encoding="utf-8")
    command = " ".join([sys.executable, "-m", "cocktail.run", *ASK[:3], "--queries", "odd.txt", "--policy", "fp16",
                        "--max-tokens", "2000"])  # long enough to be seen
    environment = f"PYTHONPATH={ROOT} TERM=xterm OMP_NUM_THREADS=1"
    shown, code = in_terminal(["/bin/sh", "-c", f"{environment} {command} > out.jsonl"])
    assert code == 0
    assert [line["question"] for line in lines_of((files / "out.jsonl").read_text())] == [
        "What is [b]?", ("and " * 50).strip(), "Who?"]
    frames = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "\n").split("\n")
    assert {frame[:20] for frame in frames if frame.startswith("answer")} == {
        "answer  What is [b]?", "answer  and and and ", "answer  Who?        "}
    assert all(re.fullmatch(r"((prefill|answer ) .{12,40} \S+ +\d+%)?", frame) for frame in frames), frames
    quiet = ["/bin/sh", "-c", f"{environment} {command} --quiet --stats none > out.jsonl"]
    assert in_terminal(quiet) == ("", 0)


def test_a_bar_goes_with_its_request(capsys):
    with ProgressBars(shown=True) as bars:
        bars.show({1: ("first", 0, 2), 2: ("second", 1, 2)})
        bars.show({2: ("second", 2, 9), 3: ("third", 0, 1)})
        assert [(task.description, task.completed, task.total) for task in bars._bars.tasks] == [
            ("second", 2, 9), ("third", 0, 1)]
