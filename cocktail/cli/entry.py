"""What every command shares: one-line errors, warnings and log, and its exit code.

    0    done
    1    a bug, with its traceback; of cocktail.doctor: something it looked at fails
    2    an error, one line `error: ...` on stderr: bad arguments, unusable files, not enough memory, ...
    130  Ctrl-C
    141  nobody reads stdout any more
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress

from runtime.errors import CocktailError

FAILED, ERROR = 1, 2
INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as a shell reports them


def run_command(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int | None],
                arguments: Sequence[str] | None = None, interrupted: str = "interrupted") -> int:
    """Parses the arguments, runs, and returns the exit code; bad arguments exit at once.

    run: returns an exit code, or None for 0. interrupted: what is said after Ctrl-C.
    """
    options = parser.parse_args(arguments)
    from cocktail.cli.log import log_to_stderr

    logger = log_to_stderr(options.log_level)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: logger.warning("%s", message)
            code = run(options)
        sys.stdout.flush()
    except CocktailError as error:
        print_error(error)
        return ERROR
    except MemoryError as error:  # from outside of what the runtime allocates itself
        print_error(f"out of memory: {str(error) or 'an allocation failed'}")
        return ERROR
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `... | head -1`
        _drop_stdout()
        return BROKEN_PIPE
    except OSError as error:
        print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
        if error.filename is None:  # such as a full disk behind stdout
            _drop_stdout()
        return ERROR
    return code or 0


def print_error(error: CocktailError | str) -> None:
    print("error:", " ".join(str(error).split()), file=sys.stderr)


def _drop_stdout() -> None:
    """So that the interpreter, which flushes stdout on its way out, does not fail there once more."""
    with suppress(io.UnsupportedOperation):  # main() may run where stdout is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
