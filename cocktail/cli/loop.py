"""What happens with one text from the user, and the loop on a terminal that reads one after another."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cocktail.cli.entry import print_error
from cocktail.cli.output import report, stream
from runtime.errors import CocktailError

if TYPE_CHECKING:
    from cocktail import Answer, Document, Model, Plan

Turn = Callable[[str], int]  # answers one text and returns the exit code


def questioning(document: Document, options: argparse.Namespace, settings: dict[str, Any]) -> Turn:
    """Each text is a question about the document. settings: of Document.ask."""
    asked: dict[str, Answer | Plan] = {}

    def turn(text: str) -> int:
        answer = stream(lambda progress: document.ask(text, progress=progress, **settings), options)
        if options.report is not None:
            from cocktail.report import write

            asked[text] = answer
            write(options.report, document, asked)
        return report(answer, options)

    return turn


def completing(model: Model, options: argparse.Namespace, settings: dict[str, Any]) -> Turn:
    """Each text is a prompt of its own. settings: of Model.generate."""
    def turn(text: str) -> int:
        prompt = text if options.system is None else [*_system(options), {"role": "user", "content": text}]
        return report(stream(
            lambda progress: model.generate(prompt, raw=options.raw, progress=progress, **settings), options), options)

    return turn


def chatting(model: Model, options: argparse.Namespace, settings: dict[str, Any]) -> Turn:
    """Each text goes on with the chat. settings: of Model.generate."""
    history = _system(options)

    def turn(text: str) -> int:
        messages = [*history, {"role": "user", "content": text}]
        answer = stream(lambda progress: model.generate(messages, progress=progress, **settings), options)
        history[:] = [*messages, {"role": "assistant", "content": answer.text}]  # a failed turn leaves no trace
        return report(answer, options)

    return turn


def ask_in_turn(turn: Turn) -> int:
    """One turn per line of a terminal, until Ctrl-D. Errors and Ctrl-C end a turn, not the loop."""
    import readline  # noqa: F401  (gives input() its line editing and history)

    while True:
        try:
            line = input("> ")
            if line.strip():
                turn(line)
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
        except CocktailError as error:
            print_error(error)


def _system(options: argparse.Namespace) -> list[dict[str, str]]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]
