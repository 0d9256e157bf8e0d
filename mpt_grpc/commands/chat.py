"""`mpt-grpc chat`: a conversation in the terminal, or with lines from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from mpt_grpc.commands.chat_input import COMMANDS, reader
from mpt_grpc.commands.connection import client_options
from mpt_grpc.commands.options import generate_options
from mpt_grpc.commands.printable import print_pieces
from mpt_grpc_client import Client, GenerateOptions, Message, MptGrpcError, Role

_KEYS = {"Ctrl-C": "stop the reply", "Alt-Enter": "start a new line, with the extra chat"}
_HELP = "\n".join(f"{name:<15} {what}" for name, what in {**COMMANDS, **_KEYS}.items())


def run(parsed: argparse.Namespace) -> None:
    """Runs the conversation. Raises MptGrpcError if a call fails and input does not come from a terminal."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("Type a message, /help for the commands, or Ctrl-D to quit.")
    options = generate_options(parsed)
    options["drop_oldest_turns"] = True
    read = reader()
    with Client(parsed.target, timeout=parsed.timeout, **client_options(parsed)) as client:
        chat = _Chat(client, options, parsed.system, is_terminal)
        # Ctrl-C may come at any time, also between a reply and the next message.
        while True:
            try:
                _converse(chat, read)
                return
            except EOFError:
                if is_terminal:
                    print()
                return
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                print("\nPress Ctrl-D to quit.")


def _converse(chat: _Chat, read: Callable[[], str]) -> None:
    """Replies to messages and follows commands until /quit. Raises EOFError at the end of the input."""
    while True:
        message = read().strip()
        command, _, argument = message.partition(" ")
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
                print(f"unknown command {command}; /help lists the commands")
            case _:
                chat.ask(message)


class _Chat:
    """The conversation so far."""

    def __init__(self, client: Client, options: GenerateOptions, system: str, is_terminal: bool) -> None:
        self._client, self._options, self._is_terminal = client, options, is_terminal
        self.start(system)

    def start(self, system: str) -> None:
        """Starts a new conversation."""
        self.system = system
        self._messages = [Message(Role.SYSTEM, system)] if system else []

    def ask(self, question: str) -> None:
        """Prints the reply as it is generated and adds it to the conversation, even if it is incomplete.

        In a terminal, Ctrl-C stops the reply, and a call that fails is reported and leaves the conversation unchanged.
        """
        messages = [*self._messages, Message(Role.USER, question)]
        stream = self._client.stream(messages, **self._options)
        try:
            with stream, _on_interrupt(stream.cancel) if self._is_terminal else contextlib.nullcontext():
                print_pieces(piece if number else piece.lstrip() for number, piece in enumerate(stream))
        except MptGrpcError as error:
            if not self._is_terminal:
                raise
            print(f"mpt-grpc: {error}", file=sys.stderr)
            return
        self._messages = [*messages, Message(Role.ASSISTANT, stream.text.strip())]


@contextlib.contextmanager
def _on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` on Ctrl-C, in a thread, since the interrupted code may hold locks that `act` needs."""
    previous = signal.signal(signal.SIGINT, lambda *_: threading.Thread(target=act).start())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
