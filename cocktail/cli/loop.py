"""One question, several, one prompt, or a chat on the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocktail.cli.output import report, stream
from runtime.errors import CocktailError, PromptError

if TYPE_CHECKING:
    from cocktail import Answer, AnswerStream, Document, Model, Plan, Verification


def questions(document: Document, options: argparse.Namespace, queries: Sequence[str],
              settings: dict[str, Any]) -> int:
    """Answers every question as a line of JSON on stdout, and returns the exit code. settings: of Document.ask.

    A question that is refused has its error in its line, and the others go on; Ctrl-C ends the answer under way and
    asks no more.
    """
    from cocktail.report import write

    rest = argparse.Namespace(**vars(options) | {"stats": options.stats or "none"})  # statistics stand in the lines
    answers: dict[str, Answer | Plan] = {}
    verified: dict[str, Verification] = {}
    failed = 0
    for query in queries:
        try:
            answer, found = _answered(document, options, query, settings, shown=False)
        except CocktailError as error:
            print(json.dumps({"question": query, "error": " ".join(str(error).split())}), flush=True)
            failed += 1
            continue
        answers[query] = answer
        verified |= {query: found["verification"]} if found else {}
        line = {"question": query, "answer": answer.text, "finish_reason": answer.finish_reason}
        line |= {name: value.to_dict() for name, value in found.items()}
        print(json.dumps(line if options.stats == "none" else line | {"stats": answer.stats.to_dict()}), flush=True)
        if code := report(answer, rest, found):
            return code
    if options.report is not None and answers:
        write(options.report, document, answers, verified)
    if failed:
        raise PromptError(f"{failed} of {len(queries)} questions could not be answered; their lines say why")
    return 0


def question(document: Document, options: argparse.Namespace, query: str, settings: dict[str, Any]) -> int:
    """Answers a question about the document and returns the exit code. settings: of Document.ask."""
    from cocktail.report import write

    answer, found = _answered(document, options, query, settings)
    if options.report is not None:
        write(options.report, document, {query: answer}, {query: found["verification"]} if found else None)
    return report(answer, options, found)


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


def _answered(document: Document, options: argparse.Namespace, query: str, settings: dict[str, Any],
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


def _ask(document: Document, query: str, settings: dict[str, Any], progress: Any) -> AnswerStream:
    stream: AnswerStream = document.ask(query, progress=progress, **settings)
    return stream
