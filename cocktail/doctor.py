"""`python -m cocktail.doctor [MODEL]`: what of this machine and build works, what does not, and what to do about it.

The table, or one line of JSON with --json, goes to stdout. Exit codes: 0, also with warnings; 1 where something fails;
2 after an error, which is one line; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cocktail.cli.arguments import Parser, at_least
from cocktail.cli.entry import FAILED, run_command
from runtime.errors import PlanError

if TYPE_CHECKING:
    from rich.table import Table

    from runtime.diagnosis import Finding

MARKS = {"pass": ("pass", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}
WIDTH = 118  # of the table where stdout is no terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; bad arguments exit with 2 at once."""
    return run_command(parser(), _run, arguments)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m cocktail.doctor",
               description="Look at the processor, its memory, the GPU, every kernel, and whether a model fits.",
               epilog="Exit code 1 where something fails; warnings are about what works, but slower or with less.")
    p.add_argument("model", metavar="MODEL", nargs="?", help="also look whether this fits: .safetensors file, "
                   ".index.json of a sharded one, or folder")
    p.add_argument("--context-tokens", metavar="N", type=at_least(1),
                   help="of the document that shall fit (default: 4096, 32768 and the model's limit)")
    p.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    p.add_conventions(quiet="no progress")
    return p


def _run(options: argparse.Namespace) -> int:
    if options.context_tokens is not None and options.model is None:
        raise PlanError("--context-tokens is about a model; give one: python -m cocktail.doctor MODEL")
    from runtime.diagnosis import diagnose, failed

    with _waiting(shown=sys.stderr.isatty() and not options.quiet):
        findings = list(diagnose())
        if options.model is not None:
            from cocktail.fit import fit

            findings += fit(options.model, options.context_tokens, findings)
    if options.json:
        _print_json(findings)
    else:
        _print_table(findings)
    return FAILED if failed(findings) else 0


def _print_json(findings: Sequence[Finding]) -> None:
    import json
    from dataclasses import asdict

    from runtime.diagnosis import failed

    print(json.dumps({"ok": not failed(findings), "findings": [asdict(finding) for finding in findings]}))


def _print_table(findings: Sequence[Finding]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(_table(findings))
    counts = [sum(finding.status == status for finding in findings) for status in MARKS]
    console.print("passed: {}; warnings: {}; failed: {}".format(*counts))


def _table(findings: Sequence[Finding]) -> Table:
    """Text, never markup: advice has brackets of its own."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("", "what", "found, and what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        mark, style = MARKS[finding.status]
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n-> {finding.advice}", style)
        table.add_row(Text(mark, style), Text(f"{finding.area}: {finding.subject}"), text)
    return table


@contextmanager
def _waiting(shown: bool) -> Iterator[None]:
    if not shown:
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("looking at the machine and trying every kernel"):
        yield


if __name__ == "__main__":
    sys.exit(main())
