"""A terminal's side of a chat: texts in, with editing, history and completion; errors and Ctrl-C out of the loop's way.

prompt_toolkit edits the lines. Python's readline cannot edit a text of several lines, takes a pasted one for several
questions, and is another library on macOS.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cocktail.cli.chat import COMMANDS, Chat
from cocktail.cli.entry import print_error
from cocktail.cli.options import POLICIES, POLICY_OPTIONS, SCORERS
from runtime.errors import CocktailError

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document as Typed
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


def converse(chat: Chat, read: Callable[[], str]) -> int:
    """Handles one text after another until Ctrl-D or /quit; returns the exit code. read raises EOFError at Ctrl-D.

    Errors and Ctrl-C end a turn, not the loop.
    """
    while True:
        try:
            text = read()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print("(Ctrl-D or /quit leaves)", file=sys.stderr)
            continue
        try:
            if not chat.handle(text):
                return 0
        except KeyboardInterrupt:
            print("(stopped before there was an answer)", file=sys.stderr)
        except CocktailError as error:
            print_error(error)
        except MemoryError as error:  # from outside of what the runtime allocates itself
            print_error(f"out of memory: {str(error) or 'an allocation failed'}")


def line_editor(history: Path | None) -> Callable[[], str]:
    """A function that reads one text: Enter sends; Alt-Enter, or a backslash before Enter, begins a new line; pasted
    lines stay one text. history: the file of earlier sessions, None to remember this session only."""
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(
        "> ", multiline=True, prompt_continuation="  ", key_bindings=_keys(), history=_history(history),
        completer=_completer(), complete_while_typing=False)
    return session.prompt


def history_file() -> Path | None:
    """In the user's folder for state, as the XDG base directories say; None, with a warning, where there is none."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        folder = state if state.is_absolute() else Path.home() / ".local/state"
    except RuntimeError:
        warnings.warn("this user has no home folder; what is typed is not kept for later chats", stacklevel=2)
        return None
    return folder / "cocktail/history"


def _keys() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _history(path: Path | None) -> History:
    """Where the file cannot be written, a warning, and the session's own history."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def store_string(self, string: str) -> None:
            try:
                super().store_string(string)
            except OSError as error:  # the disk is full, say: no reason to lose the chat
                complain(error)

    def complain(error: OSError) -> None:
        warnings.warn(f"{path}: {error.strerror or error}; what is typed is not kept for later chats", stacklevel=2)

    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # what is asked is nobody else's affair
    except OSError as error:
        complain(error)
        return InMemoryHistory()
    return Kept(path)


def _completer() -> Completer:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document as Typed

    words = {"/policy": [*POLICIES, *(name.replace("_", "-") + "=" for name in POLICY_OPTIONS)], "/scorer": [*SCORERS]}
    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        """At Tab: commands, then what they take."""

        def get_completions(self, document: Typed, complete_event: CompleteEvent) -> Iterable[Completion]:
            name, space, rest = document.text_before_cursor.partition(" ")
            if not space and name.startswith("/"):
                yield from (Completion(f"/{c}", -len(name)) for c in COMMANDS if f"/{c}".startswith(name))
            elif name == "/context":
                yield from paths.get_completions(Typed(rest), complete_event)
            else:
                word = rest.rpartition(" ")[2]
                yield from (Completion(w, -len(word)) for w in words.get(name, ()) if w.startswith(word))

    return Commands()
