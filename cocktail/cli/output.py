"""An answer on its way out: its text to stdout, what is said about it to stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail.cli.entry import INTERRUPTED
from runtime.errors import PlanError

if TYPE_CHECKING:
    from cocktail import Answer, AnswerStream, Plan


def stream(start: Callable[[Any], AnswerStream], options: argparse.Namespace, shown: bool = True) -> Answer:
    """Writes the pieces of an answer to stdout as they come, if they are to be shown, under a progress bar until the
    first."""
    from cocktail.summary import ProgressBar

    last = ""
    with ProgressBar(shown=sys.stderr.isatty() and not options.quiet) as progress:
        pieces = start(progress)
        try:
            for piece in pieces:
                progress.close()  # before the first piece: both may share one terminal
                if shown:
                    print(piece, end="", flush=True)
                    last = piece or last
        except KeyboardInterrupt:
            if pieces.plan is None:
                raise  # before all chunks were scored: there is nothing to report
            pieces.close()  # it came between two pieces; the stream itself ends cleanly on one within a piece
    if last and not last.endswith("\n"):
        print(flush=True)
    return pieces.answer


def report(answer: Answer, options: argparse.Namespace, found: Mapping[str, Any] | None = None) -> int:
    """Writes the plan and the summary that were asked for; returns the exit code. found: what summary.table takes
    besides the answer, by name."""
    from cocktail import summary

    found = found or {}
    if options.plan_out is not None:
        write_plan(options.plan_out, answer.plan)
    if options.show_plan:
        from cocktail.strip import show_plan

        print(file=sys.stderr)
        show_plan(answer.plan, sys.stderr)
    if options.stats == "json":
        print(summary.json_line(answer, **found), file=sys.stderr)
    elif options.stats == "line" and not options.quiet:
        print(summary.line(answer), file=sys.stderr)
    elif options.stats in (None, "table") and not options.quiet:
        print(f"\n{summary.table(answer, **found)}", file=sys.stderr)
    return INTERRUPTED if answer.finish_reason == "interrupted" else 0


def write_plan(path: str, plan: Plan) -> None:
    """Writes --plan-out. Raises PlanError."""
    try:
        Path(path).write_text(plan.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise PlanError(f"--plan-out {path}: {error.strerror or error}") from error


def survive_any_text() -> None:
    """A model may write what the terminal's encoding cannot show; that should not end the answer."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
