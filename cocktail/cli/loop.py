"""One question, one prompt, or a chat on the terminal."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail.cli.output import report, stream

if TYPE_CHECKING:
    from cocktail import Document, Model


def question(document: Document, options: argparse.Namespace, query: str, settings: dict[str, Any]) -> int:
    """Answers a question about the document and returns the exit code. settings: of Document.ask."""
    from cocktail.report import write

    answer = stream(lambda progress: document.ask(query, progress=progress, **settings), options)
    if options.report is not None:
        write(options.report, document, {query: answer})
    return report(answer, options)


def complete(model: Model, options: argparse.Namespace, query: str, settings: dict[str, Any]) -> int:
    """Answers a prompt without a document and returns the exit code. settings: of Model.generate."""
    prompt = query if options.system is None else [{"role": "system", "content": options.system},
                                                   {"role": "user", "content": query}]
    return report(stream(
        lambda progress: model.generate(prompt, raw=options.raw, progress=progress, **settings), options), options)


def chat_on_terminal(model: Model, options: argparse.Namespace, context: str | None, cache: dict[str, Any],
                     settings: dict[str, Any]) -> int:
    """Answers what is typed until the user leaves, and returns the exit code. cache: of Document.ask; settings: of that
    and Model.generate."""
    from cocktail.cli.chat import Chat
    from cocktail.cli.terminal import converse, history_file, line_editor

    with closing(Chat(model, options, settings, cache)) as chat:
        if context is not None:
            chat.read(context)
        if not options.quiet:
            about = f" {options.context}: {chat.document.n_chunks} chunks." if chat.document is not None else ""
            name = Path(options.model).name
            print(f"{name} on {model.backend.name}.{about} /help lists commands, Ctrl-D leaves.", file=sys.stderr)
        return converse(chat, line_editor(None if options.no_history else history_file()))
