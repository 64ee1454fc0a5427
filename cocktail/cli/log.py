"""The log of a command: the standard library's loggers under "cocktail", one line each on stderr."""

from __future__ import annotations

import logging
import sys


def log_to_stderr(level: str) -> logging.Logger:
    """The logger "cocktail", which from now on writes what is at least of this level. It may be called again."""
    logger = logging.getLogger("cocktail")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _Lines)] + [_Lines()]
    logger.setLevel(level.upper())
    return logger


class _Lines(logging.Handler):
    """`warning: text`, and below warnings the logger's name too. Asks for sys.stderr each time: a progress bar puts
    itself in its place while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        source = f" {record.name}:" if record.levelno < logging.WARNING else ""
        print(f"{record.levelname.lower()}:{source}", " ".join(record.getMessage().split()), file=sys.stderr)
