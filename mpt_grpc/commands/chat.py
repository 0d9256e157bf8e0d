"""`mpt-grpc chat`: a conversation in the terminal, or with lines that are piped in."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from mpt_grpc.commands.options import generate_options
from mpt_grpc_client import Client, GenerateOptions, Message, MptGrpcError, Role

_HELP = """\
/new            start anew
/system TEXT    set the system message and start anew
/quit           leave, as Ctrl-D does
Ctrl-C          stop the answer\
"""


def run(parsed: argparse.Namespace) -> None:
    """Raises MptGrpcError if a call fails and nobody is there to try another."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines with it
        print("/help tells what can be done here, Ctrl-D leaves.")
    options = generate_options(parsed)
    options["drop_oldest_turns"] = True
    with Client(parsed.target, timeout_s=parsed.timeout_s) as client:
        chat = _Chat(client, options, parsed.system, is_terminal)
        while (line := _read("> " if is_terminal else "")) is not None:
            command, _, argument = line.partition(" ")
            match command:
                case "":
                    continue
                case "/quit":
                    return
                case "/new":
                    chat.start(chat.system)
                case "/system":
                    chat.start(argument.strip())
                case "/help":
                    print(_HELP)
                case _ if command.startswith("/"):
                    print(f"no such command: {command}; /help lists them")
                case _:
                    chat.ask(line)


class _Chat:
    """What was said so far."""

    def __init__(self, client: Client, options: GenerateOptions, system: str, is_terminal: bool) -> None:
        self._client, self._options, self._is_terminal = client, options, is_terminal
        self.start(system)

    def start(self, system: str) -> None:
        """Forgets what was said."""
        self.system = system
        self._messages = [Message(Role.SYSTEM, system)] if system else []

    def ask(self, question: str) -> None:
        """Prints the answer as it comes. What has come of it is part of the conversation.

        In a terminal Ctrl-C ends the answer, and a call that fails is told and takes the question back.
        """
        messages = [*self._messages, Message(Role.USER, question)]
        stream = self._client.stream(messages, **self._options)
        try:
            with stream, _on_interrupt(stream.cancel) if self._is_terminal else contextlib.nullcontext():
                for number, piece in enumerate(stream):
                    print(piece if number else piece.lstrip(), end="", flush=True)
        except MptGrpcError as error:
            if not self._is_terminal:
                raise
            print(f"mpt-grpc: {error}", file=sys.stderr)
            return
        print()
        self._messages = [*messages, Message(Role.ASSISTANT, stream.text.strip())]


@contextlib.contextmanager
def _on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `act`, in a thread: what it interrupts may hold the locks that `act` takes."""
    previous = signal.signal(signal.SIGINT, lambda *_: threading.Thread(target=act).start())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _read(prompt: str) -> str | None:
    """The next line; None at the end. Ctrl-C clears the line."""
    while True:
        try:
            return input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return None
        except KeyboardInterrupt:
            print("\nCtrl-D leaves")
