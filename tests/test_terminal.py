"""The command line as a program of its own, on a terminal and in pipes, with a stand-in for the model."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASK = ["model", "--context", "doc.txt", "--query", "Who?"]
SCRIPT = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import fake_model
import cocktail
model = fake_model.FakeModel()
{setup}
vars(cocktail)["load"] = model.load
from cocktail import run
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("model").write_bytes(b"")
    Path("doc.txt").write_text("The pan was mended by Odo Farrant.\n", encoding="utf-8")
    return tmp_path


def command(files: Path, arguments: list[str], setup: str = "") -> list[str]:
    script = files / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), setup=setup))
    return [sys.executable, str(script), *arguments]


def in_terminal(line: list[str], *steps: tuple[str, str | signal.Signals]) -> tuple[str, int]:
    """Runs on a pseudo-terminal; once the next expected text is shown, types a text or sends a signal.

    Returns all that was shown and the exit code. Expect "> " before typing: what comes earlier may be lost between the
    terminal's modes.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job would ignore it, and its children too
        os.execv(line[0], line)
    shown, seen, waiting = "", 0, list(steps)
    try:
        # Linux ends a terminal's output with OSError.
        with suppress(OSError):
            while select.select([terminal], [], [], 30)[0] and (data := os.read(terminal, 4096)):
                shown += data.decode()
                while waiting and (at := shown.find(waiting[0][0], seen)) >= 0:
                    expected, action = waiting.pop(0)
                    seen = at + len(expected)
                    if isinstance(action, str):
                        os.write(terminal, action.encode())
                    else:
                        os.kill(pid, action)
            os.kill(pid, signal.SIGKILL)  # silent for too long
    finally:
        os.close(terminal)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert not waiting, f"never saw {waiting[0][0]!r} in {shown[seen:]!r}"
    return shown, code


def test_chat_loop_keeps_its_history_and_leaves_on_end_of_file(files):
    setup = "model.generate = lambda messages, **_: fake_model.FakeStream([f'[{len(messages)} messages]'])"
    shown, code = in_terminal(command(files, ["model", "--quiet"], setup),
                              ("> ", "hello\n"), ("[1 messages]\r\n> ", "again\n"), ("[3 messages]\r\n> ", "\x04"))
    assert code == 0
    assert "[3 messages]" in shown


def test_control_c_stops_a_chat_answer_but_not_the_program(files):
    setup = """
def generate(messages, **_):
    def pieces():
        yield f"[{len(messages)} messages]"
        if len(messages) == 1:
            time.sleep(60)
    stream = fake_model.FakeStream([])
    type(stream).__iter__ = lambda self: pieces()
    return stream
model.generate = generate
"""
    shown, code = in_terminal(command(files, ["model", "--quiet"], setup),
                              ("> ", "hello\n"), ("[1 messages]", signal.SIGINT), ("> ", "again\n"),
                              ("[3 messages]\r\n> ", "\x04"))
    assert code == 0
    assert "[3 messages]" in shown


def test_a_document_without_a_query_is_asked_in_a_loop(files):
    setup = "model.ask = lambda text, **_: fake_model.FakeStream([text.upper()])"
    shown, code = in_terminal(command(files, ["model", "--context", "doc.txt", "--quiet"], setup),
                              ("> ", "first\n"), ("FIRST\r\n> ", "second\n"), ("SECOND\r\n> ", "\x04"))
    assert code == 0
    assert "SECOND" in shown


def test_progress_bar_on_a_terminal(files):
    setup = """
def ask(text, progress, **_):
    for done in range(11):
        progress("prefill", done, 10)
        time.sleep(.05)
    return fake_model.FakeStream(["done"])
model.ask = ask
"""
    shown, code = in_terminal(command(files, [*ASK, "--stats", "none"], setup))
    assert code == 0
    assert "prefill" in shown
    assert "%" in shown


def test_a_reader_that_leaves_early_is_no_error(files):
    setup = "model.pieces = ['word '] * 100_000"
    process = subprocess.Popen(command(files, ASK, setup), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert err == b""


def test_text_that_the_encoding_cannot_show_does_not_end_the_answer(files):
    done = subprocess.run(command(files, ASK, "model.pieces = ['caf\\u00e9 \\u2603 ', 'end']"), capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"}, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"caf? ? end\n")
