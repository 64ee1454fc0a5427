"""A chat without its terminal: what each text from the user does. cocktail.cli.terminal reads the texts.

Without a document the turns are one conversation. With one, every text is a question of its own about it, unless the
user asks for turns: a small model that sees its earlier answers tends to repeat them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from cocktail.cli.arguments import Parser
from cocktail.cli.inputs import cache_options, check_document, read_text
from cocktail.cli.options import CACHE_OPTIONS, POLICY_OPTIONS, flag, given, parser
from cocktail.cli.output import report, stream
from runtime.errors import CocktailError, PlanError, PromptError

if TYPE_CHECKING:
    from cocktail import Answer, AnswerStream, Document, Model, Plan


@dataclass
class Chat:
    """options: of the command line; commands change this copy. settings: of Model.generate and Document.ask, sampling
    and the like. cache: of Document.ask, the policy and scorer, or the plan, that options name."""

    model: Model
    options: argparse.Namespace
    settings: dict[str, Any]
    cache: dict[str, Any] = field(default_factory=dict)
    document: Document | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)  # what was said, and the answer
    asked: dict[str, Answer | Plan] = field(default_factory=dict)  # about the document
    last: Answer | None = None
    follow: bool = False  # whether a question about the document comes behind the earlier ones

    def __post_init__(self) -> None:
        self.options = argparse.Namespace(**vars(self.options))
        self.options.stats = self.options.stats or "line"

    def handle(self, text: str) -> bool:
        """Answers a message or obeys a command; False: the user leaves. What is refused changes nothing.

        Raises CocktailError, and KeyboardInterrupt where nothing of an answer was there yet.
        """
        if not text.startswith("/"):
            if text.strip():
                self._answer(text.strip())
            return True
        name, *arguments = text[1:].split(maxsplit=1) or [""]
        if name == "quit":
            return False
        if name not in COMMANDS:
            raise PromptError(f"there is no command /{name}; /help lists them; a space before the / makes it a message")
        COMMANDS[name].run(self, arguments[0].strip() if arguments else "")
        return True

    def read(self, context: str) -> None:
        """Makes this text the document. Raises PromptError and PlanError where it does not fit model and options."""
        chunk = {} if self.options.chunk is None else {"chunk": self.options.chunk}
        document = self.model.read(context, system=self.options.system, **chunk)
        document.shape("")
        check_document(self.options, document)
        self.take(document)

    def take(self, document: Document | None) -> None:
        """Makes it the document, which is closed when another one is taken; None: there is none from now on."""
        if self.document is not None:
            self.document.close()
        self.document, self.turns, self.asked = document, [], {}

    def close(self) -> None:
        """Gives back what is kept of the document."""
        self.take(None)

    def _answer(self, text: str) -> None:
        try:
            self.last = stream(partial(self._begin, text), self.options)
        except PromptError as error:
            behind = self.turns and (self.follow or self.document is None)
            raise PromptError(f"{error}; /reset begins anew" if behind else str(error)) from error
        self.turns.append((text, self.last.text))
        if self.document is not None:
            self.asked[text] = self.last
            if self.options.report is not None:
                self._write_report(self.document, self.options.report)
        report(self.last, self.options)

    def _begin(self, text: str, progress: Any) -> AnswerStream:
        answer: AnswerStream
        if self.document is not None:
            document = self.document.after(self.turns) if self.follow and self.turns else self.document
            answer = document.ask(text, progress=progress, **self.cache, **self.settings)
        else:
            system = [] if self.options.system is None else [{"role": "system", "content": self.options.system}]
            said = [{"role": role, "content": one} for turn in self.turns
                    for role, one in zip(("user", "assistant"), turn, strict=True)]
            answer = self.model.generate([*system, *said, {"role": "user", "content": text}], progress=progress,
                                         **self.settings)
        return answer

    # Commands. Each takes what was written behind its name.

    def _help(self, _: str) -> None:
        usages = {f"/{name} {command.arguments}".rstrip(): command.meaning for name, command in COMMANDS.items()}
        width = max(map(len, usages))
        _say("\n".join(f"{usage:{width}}  {meaning}" for usage, meaning in usages.items()))
        _say("Alt-Enter, or a backslash before Enter, begins a new line. Ctrl-C stops an answer, Ctrl-D leaves.")

    def _read_file(self, name: str) -> None:
        if name:
            self.read(read_text(str(Path(name).expanduser()), "/context"))
            self.options.context = name
        if self.document is None:
            _say("there is no document; /context FILE reads one")
        else:
            _say(f"{self.options.context or self.options.document}: {len(self.document.context_ids):,} tokens, "
                 f"{self.document.n_chunks} chunks of {self.document.chunk}")

    def _choose_policy(self, words: str) -> None:
        if words:
            name, *settings = words.split()
            flags = [_policy_flag(setting) for setting in settings]
            typed = parser(_Words).parse_args([self.options.model, "--policy", name, *flags])
            chosen = {name: getattr(typed, name) for name in (*CACHE_OPTIONS, "plan_in")}  # what is not typed is reset
            if typed.seed is not None:
                chosen["seed"] = typed.seed
            chosen["pin"] = self.options.pin
            cache = self._cache(**chosen)
            if self.options.scorer is not None and cache["policy"].uses_scores:
                chosen["scorer"] = self.options.scorer
            self._choose(**chosen)
        if self.options.plan_in is not None:
            _say(f"the plan in {self.options.plan_in}")
        else:
            policy = (self.cache or self._cache())["policy"]
            listed = [f"{name}={value}" for name, value in given(self.options, POLICY_OPTIONS).items()]
            scorer = f"scorer {self.options.scorer or 'bm25'}" if policy.uses_scores else "which looks at no scores"
            pinned = f", pinned: {', '.join(map(repr, self.options.pin))}" if self.options.pin else ""
            _say(f"policy {' '.join([policy.name, *listed])}, {scorer}{pinned}")

    def _choose_scorer(self, name: str) -> None:
        if name:
            if self.options.plan_in is not None:
                raise PlanError("--plan-in decides every chunk; choose a policy first, with /policy")
            self._choose(scorer=name)
        self._choose_policy("")

    def _pin(self, text: str) -> None:
        self._choose(pin=[*(self.options.pin or []), text] if text else None)
        self._choose_policy("")

    def _cache(self, **chosen: Any) -> dict[str, Any]:
        return cache_options(argparse.Namespace(**vars(self.options) | chosen))

    def _choose(self, **chosen: Any) -> None:
        self.cache = self._cache(**chosen)  # before the options: what is refused changes nothing
        vars(self.options).update(chosen)

    def _choose_turns(self, word: str) -> None:
        if word not in ("", "on", "off"):
            raise PromptError(f"/turns {word}: expected on or off")
        self.follow = {"on": True, "off": False}.get(word, self.follow)
        _say("a question about the document comes behind the earlier ones" if self.follow else
             "every question about the document is asked by itself")

    def _show_plan(self, _: str) -> None:
        from cocktail.strip import show_plan

        show_plan(self._answered().plan, sys.stderr)

    def _show_stats(self, _: str) -> None:
        from cocktail.summary import table

        _say(table(self._answered()))

    def _show_report(self, name: str) -> None:
        if self.document is None or not self.asked:
            raise PromptError("nothing has been asked about a document yet")
        self._write_report(self.document, name or "report.html")
        _say(f"written to {name or 'report.html'}: {len(self.asked)} question{'s' * (len(self.asked) > 1)}")

    def _write_report(self, document: Document, name: str) -> None:
        from cocktail.report import write

        write(Path(name).expanduser(), document, self.asked)

    def _set_system(self, text: str) -> None:
        before = self.options.system
        self.options.system = text or None
        try:
            if self.document is not None:
                self.read(self.document.context)
        except CocktailError:
            self.options.system = before
            raise
        self.turns = []
        _say(("this" if text else "the model's own") + " system message from now on; the conversation begins anew")

    def _reset(self, _: str) -> None:
        self.turns = []
        _say("a new conversation" + ("" if self.document is None else " about the same document"))

    def _forget_document(self, _: str) -> None:
        self.take(None)
        _say("a new conversation, without a document")

    def _answered(self) -> Answer:
        if self.last is None:
            raise PromptError("nothing has been answered yet")
        return self.last


class Command(NamedTuple):
    """run: the method of Chat; the others are for /help."""

    arguments: str
    meaning: str
    run: Callable[[Chat, str], None]


COMMANDS = {
    "help": Command("", "this list", Chat._help),
    "context": Command("FILE", "talk about this document from now on; without FILE, say which", Chat._read_file),
    "policy": Command("NAME [OPTION=VALUE ...]", "how the cache is quantized, as in /policy budget kv-bits=4",
                      Chat._choose_policy),
    "scorer": Command("NAME", "what ranks the chunks", Chat._choose_scorer),
    "pin": Command("TEXT", "keep chunks that hold the text at the top tier; without TEXT, none any more", Chat._pin),
    "turns": Command("on|off", "whether a question about the document follows the earlier ones (off)",
                     Chat._choose_turns),
    "plan": Command("", "which chunk kept how many bits in the last answer", Chat._show_plan),
    "stats": Command("", "what the last answer took", Chat._show_stats),
    "report": Command("FILE", "write a page of every question about the document (report.html)", Chat._show_report),
    "system": Command("TEXT", "the system message; without TEXT, the model's own again", Chat._set_system),
    "reset": Command("", "forget the conversation", Chat._reset),
    "close": Command("", "forget the document, too", Chat._forget_document),
    "quit": Command("", "leave", lambda chat, _: None),
}


class _Words(Parser):
    """The command line's own parser, for words typed into the chat."""

    def error(self, message: str) -> NoReturn:
        raise PromptError(message)


def _policy_flag(setting: str) -> str:
    """kv_bits=4 -> --kv-bits=4. Raises PlanError for what is no option of any policy."""
    name, equals, value = setting.partition("=")
    name = name.replace("-", "_")
    if name not in (*POLICY_OPTIONS, "seed"):
        raise PlanError(f"{setting!r} is no policy's option; expected NAME=VALUE with a name of "
                        f"{', '.join(POLICY_OPTIONS)}, seed")
    return flag(name) + equals + value


def _say(text: str) -> None:
    print(text, file=sys.stderr)
