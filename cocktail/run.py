"""`python -m cocktail.run MODEL --context FILE --query TEXT`: ask about a document, complete a prompt, or chat.

The answer goes to stdout as it is generated, everything else to stderr. Exit codes: 0; 2 after an error, which is one
line `error: ...`; 130 after Ctrl-C, with what was generated until then; 141 when nobody reads stdout any more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

# Heavy imports (numpy, cocktail.load, rich) wait until the arguments are known to be good: --help must be instant.
from cocktail.cli.entry import run_command
from cocktail.cli.inputs import cache_options, check_document, check_model, read_text, sampling_options
from cocktail.cli.loop import chat_on_terminal, complete, question
from cocktail.cli.options import check, parser
from cocktail.cli.output import survive_any_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; bad arguments exit with 2 at once."""
    return run_command(parser(), _run, arguments)


def _run(options: argparse.Namespace) -> int:
    check(options)
    # Inputs are read before the model: a wrong path should not cost a load.
    context = read_text(options.context, "--context") if options.context is not None else None
    query = read_text("-", "--query") if options.query == "-" else options.query
    cache = cache_options(options) if context is not None else {}

    import cocktail

    survive_any_text()
    model = cocktail.load(options.model, backend=options.backend, threads=options.threads,
                          graph=not options.no_graph)
    check_model(options, model)
    common = {"sampling": sampling_options(options, model), "stop": tuple(options.stop), "stream": True}
    if options.max_tokens is not None:
        common["max_tokens"] = options.max_tokens

    if query is None:
        return chat_on_terminal(model, options, context, cache, common)
    if context is None:
        return complete(model, options, query, common)
    chunk = {} if options.chunk is None else {"chunk": options.chunk}
    document = model.read(context, system=options.system, keep=False, **chunk)  # a copy is for further questions
    check_document(options, document)
    return question(document, options, query, cache | common)


if __name__ == "__main__":
    sys.exit(main())
