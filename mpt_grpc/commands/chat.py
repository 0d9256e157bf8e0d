"""`mpt-grpc chat`: a conversation in the terminal, or with lines that are piped in."""

from __future__ import annotations

import argparse
import contextlib
import sys

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
        chat = _Chat(client, options, parsed.system)
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
                    chat.ask(line, goes_on=is_terminal)


class _Chat:
    """What was said so far."""

    def __init__(self, client: Client, options: GenerateOptions, system: str) -> None:
        self._client, self._options = client, options
        self.start(system)

    def start(self, system: str) -> None:
        """Forgets what was said."""
        self.system = system
        self._messages = [Message(Role.SYSTEM, system)] if system else []

    def ask(self, question: str, *, goes_on: bool) -> None:
        """Prints the answer as it comes; Ctrl-C ends it, and what has come by then is part of the conversation.

        A call that fails takes the question back; with `goes_on` it is told and no more.
        """
        messages = [*self._messages, Message(Role.USER, question)]
        stream = self._client.stream(messages, **self._options)
        try:
            with stream, contextlib.suppress(KeyboardInterrupt):
                for number, piece in enumerate(stream):
                    print(piece if number else piece.lstrip(), end="", flush=True)
        except MptGrpcError as error:
            if not goes_on:
                raise
            print(f"mpt-grpc: {error}", file=sys.stderr)
            return
        print()
        self._messages = [*messages, Message(Role.ASSISTANT, stream.text.strip())]


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
