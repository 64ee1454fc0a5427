"""The chat without a terminal: texts in, answers and what commands say out, errors that end a turn only."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, FakeStream

from cocktail.cli.chat import COMMANDS, Chat
from cocktail.cli.inputs import cache_options
from cocktail.cli.options import parser
from cocktail.cli.terminal import converse, history_file
from runtime.errors import CocktailError, PlanError, PromptError


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my doc.txt").write_text("The pan was mended by Odo Farrant.\n", encoding="utf-8")


def options(*arguments: str) -> argparse.Namespace:
    return parser().parse_args(["model", *arguments])


def start(model: FakeModel, *arguments: str) -> Chat:
    given = options(*arguments)
    chat = Chat(model, given, {}, {} if given.context is None else cache_options(given))
    if given.context is not None:
        chat.read(Path(given.context).read_text())
    return chat


def feed(texts: Iterable[str | BaseException]) -> Any:
    """A line editor's place: what is typed, or raised, one after another; then Ctrl-D."""
    rest: Iterator[str | BaseException] = iter(texts)

    def read() -> str:
        text = next(rest, EOFError())
        if isinstance(text, BaseException):
            raise text
        return text

    return read


def asked(model: FakeModel) -> dict[str, Any]:
    return next(options for call, _, options in reversed(model.calls) if call == "ask")


def messages(model: FakeModel) -> list[tuple[str, str]]:
    prompt = next(arguments[0] for call, arguments, _ in reversed(model.calls) if call == "generate")
    return [(message["role"], message["content"]) for message in prompt]


def refuse(query: str) -> None:
    raise PromptError("the prompt has 9000 tokens")


def test_turns_are_one_conversation_under_the_system_message(model):
    chat = start(model, "--system", "Be brief.")
    for text in ("Hello", " /not a command"):
        assert chat.handle(text)
    assert messages(model) == [("system", "Be brief."), ("user", "Hello"), ("assistant", "Odo Farrant"),
                               ("user", "/not a command")]


def test_a_blank_text_asks_nothing(model):
    assert converse(start(model), feed(["", "  \n "])) == 0
    assert not model.calls


def test_an_answer_is_followed_by_one_line_unless_another_form_is_asked_for(model, capsys):
    start(model).handle("Hello")
    assert capsys.readouterr().err.count("\n") == 1
    start(model, "--stats", "table").handle("Hello")
    assert "backend" in capsys.readouterr().err
    start(model, "--quiet").handle("Hello")
    assert capsys.readouterr().err == ""


def test_questions_about_a_document_follow_one_another_where_that_is_asked_for(model, capsys):
    chat = start(model)
    chat.handle("Hello")
    chat.handle("/context my doc.txt")
    assert "my doc.txt: 100 tokens, 3 chunks of 32" in capsys.readouterr().err
    for text in ("Who?", "Which?", "/turns on", "When?", "/reset", "Where?"):
        chat.handle(text)
    behind = [(call, arguments) for call, arguments, _ in model.calls if call in ("after", "ask")]
    said = [("Who?", "Odo Farrant"), ("Which?", "Odo Farrant")]
    assert behind == [("ask", ("Who?",)), ("ask", ("Which?",)), ("after", (said,)), ("ask", ("When?",)),
                      ("ask", ("Where?",))]
    chat.handle("/close")
    assert model.calls[-1][0] == "close"
    chat.handle("Hello again")
    assert messages(model) == [("user", "Hello again")]


def test_policies_and_scorers_are_those_of_the_command_line(model, capsys):
    chat = start(model, "--context", "my doc.txt", "--kv-bits", "4")
    chat.handle("/policy cocktail no-search alpha=0.5 seed=7")
    assert "policy cocktail alpha=0.5 no_search=True, scorer bm25" in capsys.readouterr().err
    chat.handle("Who?")
    policy = asked(model)["policy"]
    assert (policy.name, policy.alpha, policy.no_search, policy.seed) == ("cocktail", 0.5, True, 7)
    chat.handle("/scorer random")
    chat.handle("/policy budget")
    chat.handle("Who?")
    assert (asked(model)["policy"].kv_bits, asked(model)["scorer"].name) == (None, "random:7")
    capsys.readouterr()
    chat.handle("/policy fp16")
    chat.handle("/policy")
    assert capsys.readouterr().err == 2 * "policy fp16, which looks at no scores\n"
    chat.handle("Who?")
    assert "scorer" not in asked(model)


def test_pins_stay_until_they_are_taken_back(model, capsys):
    chat = start(model, "--context", "my doc.txt", "--pin", "the pan")
    chat.handle("/pin Odo Farrant")
    assert "pinned: 'the pan', 'Odo Farrant'" in capsys.readouterr().err
    chat.handle("/policy budget kv-bits=4")
    chat.handle("Who?")
    assert asked(model)["pin"] == ["the pan", "Odo Farrant"]
    with pytest.raises(PlanError, match="pin"):
        chat.handle("/policy kivi")
    chat.handle("/pin")
    chat.handle("/policy kivi")
    chat.handle("Who?")
    assert "pin" not in asked(model)


@pytest.mark.parametrize(("text", "error", "says"), [
    ("/help me", None, ""), ("/nonsense", PromptError, "/nonsense"), ("/", PromptError, "no command"),
    ("/context", None, ""), ("/context nothing.txt", PromptError, "/context nothing.txt: No such file"),
    ("/policy nonsense", PlanError, "nonsense"), ("/policy budget kv-bits=none", PromptError, "--kv-bits"),
    ("/policy budget max-tokens=3", PlanError, "max-tokens=3"), ("/policy uniform", PlanError, "needs a tier"),
    ("/policy budget no-search=1", PromptError, "--no-search"), ("/policy cocktail kv-bits=3", PlanError, "kv_bits"),
    ("/scorer ./nowhere", CocktailError, "nowhere"), ("/plan", PromptError, "nothing has been answered"),
    ("/stats", PromptError, "nothing has been answered"), ("/turns no", PromptError, "on or off"),
])
def test_what_is_refused_changes_nothing(model, text, error, says):
    chat = start(model, "--context", "my doc.txt")
    before = vars(chat.options).copy(), dict(chat.cache), chat.document
    if error is None:
        assert chat.handle(text)
    else:
        with pytest.raises(error, match=says):
            chat.handle(text)
    assert (vars(chat.options), chat.cache, chat.document) == before


def test_attention_goes_with_no_policy_that_needs_scores_first(model):
    chat = start(model, "--context", "my doc.txt", "--scorer", "attention")
    with pytest.raises(PlanError, match="attention"):
        chat.handle("/policy cocktail")
    assert chat.cache["policy"].name == "budget"


def test_a_document_that_is_too_long_is_not_taken(model, monkeypatch):
    chat = start(model)
    monkeypatch.setattr(model, "shape", refuse)
    with pytest.raises(PromptError):
        chat.handle("/context my doc.txt")
    assert (chat.document, chat.options.context) == (None, None)


def test_a_system_message_that_no_longer_fits_is_not_taken(model, monkeypatch):
    chat = start(model, "--context", "my doc.txt", "--system", "Be brief.")
    document = chat.document
    monkeypatch.setattr(model, "shape", refuse)
    with pytest.raises(PromptError):
        chat.handle("/system Be long.")
    assert (chat.document, chat.options.system) == (document, "Be brief.")


def test_another_system_message_begins_anew(model, capsys):
    chat = start(model)
    chat.handle("Hello")
    chat.handle("/system Be   brief.")
    chat.handle("Hello")
    assert messages(model) == [("system", "Be   brief."), ("user", "Hello")]
    chat.handle("/context my doc.txt")
    chat.handle("/system")
    assert model.calls[-2:] == [("read", (Path("my doc.txt").read_text(),), {"system": None}), ("close", (), {})]


def test_plan_and_stats_are_those_of_the_last_answer(model, capsys):
    chat = start(model, "--context", "my doc.txt", "--quiet")
    chat.handle("Who?")
    capsys.readouterr()
    chat.handle("/plan")
    assert "policy budget, scorer bm25: 3 chunks" in capsys.readouterr().err
    chat.handle("/stats")
    assert "cpu: avx2 kernels" in capsys.readouterr().err


def test_the_report_is_of_every_question_about_the_document(model, monkeypatch, capsys):
    import cocktail.report

    written = []
    monkeypatch.setattr(cocktail.report, "write", lambda path, _, asked: written.append((str(path), list(asked))))
    chat = start(model, "--context", "my doc.txt")
    with pytest.raises(PromptError, match="nothing has been asked"):
        chat.handle("/report")
    for text in ("Who?", "When?", "/report", "/context my doc.txt", "Where?", "/report out.html"):
        chat.handle(text)
    assert written == [("report.html", ["Who?", "When?"]), ("out.html", ["Where?"])]
    written.clear()
    start(model, "--context", "my doc.txt", "--report", "page.html").handle("Who?")
    assert written == [("page.html", ["Who?"])]


def test_help_names_every_command(model, capsys):
    start(model).handle("/help")
    shown = capsys.readouterr().err
    for name, command in COMMANDS.items():
        assert f"/{name} {command.arguments}".strip() in shown
        assert command.meaning in shown


def exhausted(chat: Chat, _: str) -> None:
    raise MemoryError


def test_errors_and_control_c_end_a_turn_and_not_the_loop(model, monkeypatch, capsys):
    model.pieces = [PromptError("too\nlong")]
    chat = start(model)
    monkeypatch.setitem(COMMANDS, "stats", COMMANDS["stats"]._replace(run=exhausted))
    assert converse(chat, feed(["Hello", KeyboardInterrupt(), "/nonsense", "/stats", "/quit", "never"])) == 0
    err = capsys.readouterr().err
    assert err.splitlines()[0] == "error: too long"
    assert "leaves" in err
    assert "error: there is no command /nonsense" in err
    assert "error: out of memory: an allocation failed" in err
    assert [call for call, _, _ in model.calls] == ["generate"]
    assert chat.turns == []  # a failed turn leaves no trace


def test_a_conversation_that_is_too_long_can_begin_anew(model):
    chat = start(model)
    chat.handle("Hello")
    model.pieces = [PromptError("the prompt has 9000 tokens")]
    with pytest.raises(PromptError, match="9000 tokens; /reset begins anew"):
        chat.handle("Hello")
    assert chat.turns == [("Hello", "Odo Farrant")]


def test_an_interrupted_answer_is_kept_as_far_as_it_went(model, capsys):
    model.pieces = ["Odo ", KeyboardInterrupt()]
    chat = start(model)
    assert converse(chat, feed(["Who?"])) == 0
    assert chat.turns == [("Who?", "Odo ")]
    model.generate = lambda *_, **__: FakeStream([KeyboardInterrupt()], plan=None)  # before there is a plan
    assert converse(chat, feed(["And?"])) == 0
    assert "(stopped before there was an answer)" in capsys.readouterr().err
    assert len(chat.turns) == 1


def test_the_history_is_in_the_folder_for_state_or_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # to be ignored, by the standard
    assert history_file() == tmp_path / ".local/state/cocktail/history"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_file() == Path("/state/cocktail/history")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.warns(UserWarning, match="no home folder"):
        assert history_file() is None


def test_the_docs_name_every_command():
    docs = (Path(__file__).parents[1] / "docs/command-line.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`/([a-z]+)", docs.partition("## Chat")[2])) == COMMANDS.keys()
