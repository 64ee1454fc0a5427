"""What every command of the project shares: one-line errors, exit codes, and types of arguments.

Exit codes: 0; 1 after a bug, with its traceback; 2 after an error, which is one line; 130 after Ctrl-C; 141 when nobody
reads stdout any more.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from runtime.errors import CocktailError

ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # the last two: 128 + SIGINT, 128 + SIGPIPE, as a shell reports them


def run_command(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int | None],
                arguments: Sequence[str] | None = None, interrupted: str = "interrupted") -> int:
    """Parses the arguments, runs, and returns the exit code; bad arguments exit at once.

    run: returns an exit code, or None for 0. interrupted: what is said after Ctrl-C.
    """
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print("warning:", message, file=sys.stderr)
            code = run(options)
        sys.stdout.flush()
    except CocktailError as error:
        print_error(error)
        return ERROR
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `... | head -1`: quiet, also when the interpreter flushes stdout on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return code or 0


def print_error(error: CocktailError) -> None:
    print("error:", " ".join(str(error).split()), file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Options are written out in full, and what is wrong with them is one line."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(ERROR, f"error: {message} (see --help)\n")


class Version(argparse.Action):
    """Looks the version up only when asked: importlib.metadata is slow to import."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("cocktail-kv")
        except PackageNotFoundError:
            number = "(not installed)"
        print("cocktail-kv", number)
        parser.exit()


def at_least(low: int) -> Callable[[str], int]:
    """The type of an integer option that has a least value."""
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r}; expected an integer of at least {low}")
        return value

    return parse


def number(text: str) -> float:
    """The type of an option that is a finite number of at least 0; tighter bounds are the API's."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of at least 0")
    return value
