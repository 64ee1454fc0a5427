"""What the parsers of all commands share: the options of convention, and types of arguments."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from cocktail.cli.entry import ERROR

LOG_LEVELS = ("debug", "info", "warning", "error")


class Parser(argparse.ArgumentParser):
    """Options are written out in full, and what is wrong with them is one line."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, allow_abbrev=False, add_help=False, formatter_class=_Help, **settings)

    def add_conventions(self, quiet: str) -> Any:
        """The options that every command has, in a group of their own, which is returned. quiet: what it leaves out."""
        group = self.add_argument_group("conventions")
        group.add_argument("--quiet", action="store_true", help=quiet)
        group.add_argument("--log-level", metavar="LEVEL", type=_log_level,
                           default=os.environ.get("COCKTAIL_LOG_LEVEL") or "warning",
                           help=f"{', '.join(LOG_LEVELS)} (default: warning, or what COCKTAIL_LOG_LEVEL says)")
        group.add_argument("--version", action=_Version, help="print the version and exit")
        group.add_argument("-h", "--help", action="help", help="print this and exit")
        return group

    def error(self, message: str) -> NoReturn:
        self.exit(ERROR, f"error: {' '.join(message.split())} (see --help)\n")


class _Help(argparse.HelpFormatter):
    """Every option that takes a value shows its default; a parser names only those that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.nargs == 0 or action.required or action.default is argparse.SUPPRESS or "default" in (
            action.help or "")
        return action.help if plain else f"{action.help} (default: none)"


class Completion(argparse.Action):
    """Prints the completion script of the installed command and exits. words: option's dest -> what it may be."""

    def __init__(self, option_strings: list[str], dest: str, command: str, words: Mapping[str, Sequence[str]],
                 **settings: Any) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **settings)
        self._command, self._words = command, words

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: object = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab; run: pip install 'cocktail-kv[completion]'")
        for action in parser._actions:  # this parser parses nothing any more
            action.choices = self._words.get(action.dest, action.choices)
            if action.metavar in ("FILE", "MODEL"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        parser.prog = self._command
        print(shtab.complete(parser, values))
        parser.exit()


class _Version(argparse.Action):
    """Looks the version up only when asked: importlib.metadata is slow to import."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("cocktail-kv")
        except PackageNotFoundError:
            from cocktail import __version__

            number = f"{__version__} (from its sources)"
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


def _log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise argparse.ArgumentTypeError(f"{text!r}; expected one of {', '.join(LOG_LEVELS)}")
    return text.lower()
