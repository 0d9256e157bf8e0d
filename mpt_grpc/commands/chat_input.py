"""The input of `mpt-grpc chat`: the lines of a pipe, or messages that are edited in a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

COMMANDS = {
    "/new": "start a new conversation",
    "/system TEXT": "start a new conversation with this system message",
    "/help": "list the commands",
    "/quit": "quit, as Ctrl-D does",
}
_PROMPT = "> "


def reader() -> Callable[[], str]:
    """Returns the function that reads a message, or a line of a pipe. It raises EOFError at the end of the input."""
    return _editor() if sys.stdin.isatty() else input


def _editor() -> Callable[[], str]:
    """Returns the function that reads a message: that of prompt_toolkit, or `input`, with readline if there is one."""
    if os.environ.get("TERM") == "dumb" or find_spec("prompt_toolkit") is None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines with it
        return lambda: input(_PROMPT)
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    session: PromptSession[str] = PromptSession(
        _PROMPT,
        multiline=True,
        key_bindings=_key_bindings(),
        history=_history(),
        completer=WordCompleter([name.split()[0] for name in COMMANDS], sentence=True),
        complete_while_typing=False,
    )
    return session.prompt


def _key_bindings() -> KeyBindings:
    """Returns the keys of a message of several lines: Enter sends it, and Alt-Enter starts a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def start_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """Returns the messages of earlier conversations, in a file that only its owner can read."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "mpt-grpc"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / "chat_history", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(folder / "chat_history"))
