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
PROMPT = "\x1b[?2004h"  # the editor is ready: what is pasted from now on comes marked as such
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
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")  # nobody here would say where the cursor is
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    Path("model").write_bytes(b"")
    Path("doc.txt").write_text("The pan was mended by Odo Farrant.\n", encoding="utf-8")
    return tmp_path


def command(files: Path, arguments: list[str], setup: str = "") -> list[str]:
    script = files / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"), setup=setup))
    return [sys.executable, str(script), *arguments]


def in_terminal(line: list[str], *steps: tuple[str, str | signal.Signals]) -> tuple[str, int]:
    """Runs on a pseudo-terminal; once the next expected text is shown, types a text or sends a signal.

    Returns all that was shown and the exit code. Expect PROMPT before typing: what comes earlier may be lost between
    the terminal's modes.
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


COUNT = "model.generate = lambda messages, **_: fake_model.FakeStream([f'[{len(messages)} messages]'])"
REPEAT = "model.generate = lambda messages, **_: fake_model.FakeStream([repr(messages[-1]['content'])])"


def test_chat_keeps_its_turns_and_leaves_on_end_of_file(files):
    shown, code = in_terminal(command(files, ["model", "--quiet"], COUNT), (PROMPT, "hello\r"), ("[1 messages]", ""),
                              (PROMPT, "again\r"), ("[3 messages]", ""), (PROMPT, "\x04"))
    assert code == 0
    assert "/help" not in shown


@pytest.mark.parametrize("typed", ["one\x1b\rtwo\r", "one\\\rtwo\r", "\x1b[200~one\ntwo\x1b[201~\r"],
                         ids=["alt-enter", "backslash", "pasted"])
def test_a_text_of_two_lines_is_one_message(files, typed):
    _, code = in_terminal(command(files, ["model", "--quiet"], REPEAT), (PROMPT, typed), ("'one\\ntwo'", ""),
                          (PROMPT, "/quit\r"))
    assert code == 0


def test_the_arrow_keys_bring_back_what_an_earlier_chat_was_told(files):
    line = command(files, ["model", "--quiet"], REPEAT)
    in_terminal(line, (PROMPT, "first\r"), ("'first'", ""), (PROMPT, "\x04"))
    history = files / "state/cocktail/history"
    assert history.stat().st_mode & 0o077 == 0
    in_terminal([*line, "--no-history"], (PROMPT, "secret\r"), ("'secret'", ""), (PROMPT, "\x1b[A again\r"),
                ("'secret again'", ""), (PROMPT, "\x04"))
    assert "secret" not in history.read_text()
    in_terminal(line, (PROMPT, "\x1b[A, again\r"), ("'first, again'", ""), (PROMPT, "\x04"))


def test_a_history_that_cannot_be_kept_is_a_warning(files):
    Path("state").write_text("in the way")
    shown, code = in_terminal(command(files, ["model", "--quiet"], REPEAT), (PROMPT, "hello\r"), ("'hello'", ""),
                              (PROMPT, "\x04"))
    assert code == 0
    assert "warning: " in shown
    assert "is not kept for later chats" in shown


def test_tab_completes_commands_files_and_policies(files):
    _, code = in_terminal(command(files, ["model"]), ("/help lists", ""),
                          (PROMPT, "/cont\t"), ("ext", " d\t"), ("oc.txt", "\r"), ("chunks of", ""),
                          (PROMPT, "/pol\t"), ("icy", " uni\t"), ("form", " tier=K4V2\r"),
                          ("policy uniform tier=K4V2", ""), (PROMPT, "/quit\r"))
    assert code == 0


def test_control_c_at_the_prompt_drops_the_line(files):
    _, code = in_terminal(command(files, ["model", "--quiet"], REPEAT), (PROMPT, "wrong\x03"), ("leaves", ""),
                          (PROMPT, "right\r"), ("'right'", ""), (PROMPT, "\x04"))
    assert code == 0


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
                              (PROMPT, "hello\r"), ("[1 messages]", signal.SIGINT), (PROMPT, "again\r"),
                              ("[3 messages]", ""), (PROMPT, "\x04"))
    assert code == 0
    assert "leaves" not in shown


def test_a_document_without_a_query_is_asked_in_a_loop(files):
    setup = "model.ask = lambda text, **_: fake_model.FakeStream([text.upper()])"
    shown, code = in_terminal(command(files, ["model", "--context", "doc.txt", "--quiet"], setup),
                              (PROMPT, "first\r"), ("FIRST", ""), (PROMPT, "second\r"), ("SECOND", ""),
                              (PROMPT, "\x04"))
    assert code == 0
    assert "error" not in shown


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
