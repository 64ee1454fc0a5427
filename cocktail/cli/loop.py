"""One question, one prompt, or a chat on the terminal."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail.cli.output import report, stream

if TYPE_CHECKING:
    from cocktail import Answer, AnswerStream, Document, Model


def question(document: Document, options: argparse.Namespace, query: str, settings: dict[str, Any]) -> int:
    """Answers a question about the document and returns the exit code. settings: of Document.ask."""
    from cocktail.report import write

    answer, found = answered(document, options, query, settings)
    if options.report is not None:
        write(options.report, document, {query: answer}, {query: found["verification"]} if found else None)
    return report(answer, options, found)


def answered(document: Document, options: argparse.Namespace, query: str, settings: dict[str, Any],
             shown: bool = True) -> tuple[Answer, dict[str, Any]]:
    """The answer and, by name, what --verify found: a Verification, a Promotion. Written to stdout as it comes, or at
    once where its budget may rise, if it is to be shown."""
    from cocktail.promote import promote
    from cocktail.summary import ProgressBar

    with ProgressBar(shown=sys.stderr.isatty() and not options.quiet) as progress:
        if options.verify == "promote":
            bound = {} if options.verify_kl is None else {"kl": options.verify_kl}
            again = {name: value for name, value in settings.items() if name != "stream"}
            promotion = promote(document, query, progress=progress, **bound, **again)
            if shown:
                progress.close()
                print(promotion.answer.text.removesuffix("\n"))
            return promotion.answer, {"verification": promotion.verification, "promotion": promotion}
        answer = stream(partial(_ask, document, query, settings), options, shown)
        if not options.verify or not answer.ids or answer.finish_reason == "interrupted":
            return answer, {}
        return answer, {"verification": document.verify(query, answer, progress)}


def complete(model: Model, options: argparse.Namespace, query: str, settings: dict[str, Any]) -> int:
    """Answers a prompt without a document and returns the exit code. settings: of Model.generate."""
    prompt = query if options.system is None else [{"role": "system", "content": options.system},
                                                   {"role": "user", "content": query}]
    return report(stream(
        lambda progress: model.generate(prompt, raw=options.raw, progress=progress, **settings), options), options)


def chat_on_terminal(model: Model, options: argparse.Namespace, document: Document | None, cache: dict[str, Any],
                     settings: dict[str, Any]) -> int:
    """Answers what is typed until the user leaves, and returns the exit code. cache: of Document.ask; settings: of that
    and Model.generate."""
    from cocktail.cli.chat import Chat
    from cocktail.cli.terminal import converse, history_file, line_editor

    with closing(Chat(model, options, settings, cache)) as chat:
        if document is not None:
            chat.take(document)
        if not options.quiet:
            about = "" if document is None else f" {options.context or options.document}: {document.n_chunks} chunks."
            name = Path(options.model).name
            print(f"{name} on {model.backend.name}.{about} /help lists commands, Ctrl-D leaves.", file=sys.stderr)
        return converse(chat, line_editor(None if options.no_history else history_file()))


def _ask(document: Document, query: str, settings: dict[str, Any], progress: Any) -> AnswerStream:
    stream: AnswerStream = document.ask(query, progress=progress, **settings)
    return stream
