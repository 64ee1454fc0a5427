"""Several questions about one document: a line of JSON for each, in their order."""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from cocktail.cli.loop import answered
from cocktail.cli.output import report
from runtime.errors import BackendError, CocktailError, OutOfMemory, PromptError

if TYPE_CHECKING:
    from cocktail import Answer, Document, Model, Plan, Scheduler, Submission, Verification

AHEAD = 32  # questions in the scheduler, or done behind one that is not: 16 run, the others' plans are made meanwhile
TICK = 0.1  # seconds between two looks at how far they are, where that is shown
NAME = 40  # characters of a question beside its bar


def questions(document: Document, options: argparse.Namespace, queries: Sequence[str],
              settings: dict[str, Any]) -> int:
    """Answers every question as a line of JSON on stdout and returns the exit code. settings: of Document.ask.

    A line is written once its question and all before it are done. A question that is refused has its error in its
    line, and the others go on.
    """
    # Together they take fewer passes over the weights. One after another where
    # - --verify reads the prompt again behind each answer, and may ask again;
    # - --report shows the times of an answer, which have to be its own;
    # - memory is free for no more than the weights, or the system does not say how much is free.
    # On CUDA the last bits of a batch's logits are not those of an answer alone; they do not depend on the company.
    lines = _Lines(options)
    scheduler = None if options.verify or options.report is not None else _scheduler(document.model)
    if scheduler is None:
        code = _in_turn(document, options, queries, settings, lines)
    else:
        with scheduler:
            code = _together(document, options, queries, settings, lines)
    if not code and lines.failed:
        raise PromptError(f"{lines.failed} of {len(queries)} questions could not be answered; their lines say why")
    return code


class _Lines:
    """What is said about each question. failed: how many of them have an error in their line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._stats = options.stats != "none"
        # Statistics stand in the lines.
        self._rest = argparse.Namespace(**vars(options) | {"stats": options.stats or "none"})
        self.failed = 0

    def write(self, query: str, outcome: Answer | CocktailError, found: Mapping[str, Any] | None = None) -> int:
        """The line to stdout, what else was asked for to stderr; returns the exit code. found: as output.report's."""
        line: dict[str, Any] = {"question": query}
        if isinstance(outcome, CocktailError):
            self.failed += 1
            print(json.dumps(line | {"error": " ".join(str(outcome).split())}), flush=True)
            return 0
        line |= {"answer": outcome.text, "finish_reason": outcome.finish_reason}
        line |= {name: value.to_dict() for name, value in (found or {}).items()}
        print(json.dumps(line | {"stats": outcome.stats.to_dict()} if self._stats else line), flush=True)
        return report(outcome, self._rest, found)


def _in_turn(document: Document, options: argparse.Namespace, queries: Sequence[str], settings: dict[str, Any],
             lines: _Lines) -> int:
    """One after another. Ctrl-C ends the answer under way, which has its line as far as it went, and asks no more."""
    from cocktail.report import write

    answers: dict[str, Answer | Plan] = {}
    verified: dict[str, Verification] = {}
    for query in queries:
        try:
            answer, found = answered(document, options, query, settings, shown=False)
        except CocktailError as error:
            lines.write(query, error)
            continue
        answers[query] = answer
        verified |= {query: found["verification"]} if found else {}
        if code := lines.write(query, answer, found):
            return code
    if options.report is not None and answers:
        write(options.report, document, answers, verified)
    return 0


def _together(document: Document, options: argparse.Namespace, queries: Sequence[str], settings: dict[str, Any],
              lines: _Lines) -> int:
    """Among one another, in the model's scheduler. Ctrl-C passes through; the lines of all that had ended are written
    before, and the others are cancelled."""
    from cocktail.summary import ProgressBars

    submit = partial(_submit, document, {name: value for name, value in settings.items() if name != "stream"})
    with ProgressBars(shown=sys.stderr.isatty() and not options.quiet) as bars:
        asked, waiting = deque([submit(0, queries[0])]), deque(enumerate(queries[1:], 1))
        if isinstance(asked[0].course, OutOfMemory):  # beside all of the weights; a question by itself may drop some
            return _in_turn(document, options, queries, settings, lines)
        try:
            while asked:
                while waiting and len(asked) < AHEAD:
                    asked.append(submit(*waiting.popleft()))
                while not asked[0].wait(TICK if bars.shown else None):
                    bars.show({each.number: row for each in asked if (row := each.row()) is not None})
                bars.hide()
                first = asked.popleft()
                lines.write(first.query, first.outcome())
        except KeyboardInterrupt:
            bars.hide()
            for each in asked:
                if each.wait(0):
                    lines.write(each.query, each.outcome())
            raise
    return 0


@dataclass(frozen=True)
class _Asked:
    """A question on its way. course: through the scheduler, or why it was not let in. read: steps of its prefill that
    are done, and in all."""

    number: int
    query: str
    course: Submission | CocktailError
    read: list[int]

    def wait(self, timeout: float | None) -> bool:
        """Until it has ended, at most so many seconds; whether it has."""
        return isinstance(self.course, CocktailError) or self.course.wait(timeout)

    def outcome(self) -> Answer | CocktailError:
        """What it ended with."""
        if isinstance(self.course, CocktailError):
            return self.course
        try:
            return self.course.result()
        except CocktailError as error:
            return error

    def row(self) -> tuple[str, int, int] | None:
        """What is being done for it, how much of it is done, and how much there is in all; None where nothing is."""
        if isinstance(self.course, CocktailError):
            return None
        text = "".join(letter if letter.isprintable() else " " for letter in self.query)
        name = text if len(text) <= NAME else f"{text[: NAME - 1]}…"
        if self.course.state == "reading":
            return f"prefill {name}", self.read[0], self.read[1]
        if self.course.state == "running":
            return f"answer  {name}", len(self.course.ids), self.course.max_tokens
        return None


def _scheduler(model: Model) -> Scheduler | None:
    """None where memory is free for no more than the weights, or it is not known how much is. Nobody reads along, so
    running answers may wait for prompts: the more of them are read, the more decode together."""
    try:
        return model.serve(pause=inf)
    except (BackendError, OutOfMemory):
        return None


def _submit(document: Document, settings: dict[str, Any], number: int, query: str) -> _Asked:
    read = [0, 1]

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "prefill":
            read[:] = done, total

    try:
        return _Asked(number, query, document.submit(query, progress=progress, **settings), read)
    except CocktailError as error:
        return _Asked(number, query, error, read)
