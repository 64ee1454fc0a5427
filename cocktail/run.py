"""`python -m cocktail.run MODEL --context FILE --query TEXT`: ask about a document, complete a prompt, or chat.

The answer goes to stdout as it is generated, everything else to stderr; several answers go there as JSON lines. Exit
codes: 0; 2 after an error, which is one
line `error: ...`; 130 after Ctrl-C, with what was generated until then; 141 when nobody reads stdout any more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

# Heavy imports (numpy, cocktail.load, rich) wait until the arguments are known to be good: --help must be instant.
from cocktail.cli.dry_run import dry_run
from cocktail.cli.entry import run_command
from cocktail.cli.inputs import (
    cache_options,
    check_model,
    read_document,
    read_queries,
    read_text,
    sampling_options,
)
from cocktail.cli.loop import chat_on_terminal, complete, question
from cocktail.cli.options import check, on_terminal, parser
from cocktail.cli.output import survive_any_text
from cocktail.cli.questions import questions


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; bad arguments exit with 2 at once."""
    return run_command(parser(), _run, arguments)


def _run(options: argparse.Namespace) -> int:
    check(options)
    # Inputs are read before the model: a wrong path should not cost a load.
    context = read_text(options.context, "--context") if options.context is not None else None
    queries = read_queries(options)
    cache = cache_options(options) if context is not None or options.document is not None else {}

    survive_any_text()
    if options.dry_run and context is not None and queries is not None:  # else check refuses
        return dry_run(options, context, queries[0], cache)

    import cocktail

    model = cocktail.load(options.model, backend=options.backend, threads=options.threads,
                          graph=not options.no_graph)
    check_model(options, model)
    common = {"sampling": sampling_options(options, model), "stop": tuple(options.stop), "stream": True}
    if options.max_tokens is not None:
        common["max_tokens"] = options.max_tokens

    document = read_document(options, model, context)
    if queries is None:
        if not on_terminal():
            return 0  # the document is saved, which is all that was asked for
        return chat_on_terminal(model, options, document, cache, common)
    if document is None:
        return complete(model, options, queries[0], common)
    if options.queries is None and len(queries) == 1:
        return question(document, options, queries[0], cache | common)
    return questions(document, options, queries, cache | common)


if __name__ == "__main__":
    sys.exit(main())
