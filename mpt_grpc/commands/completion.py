"""`mpt-grpc completion`: prints a script that completes the commands and flags of `mpt-grpc` in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from mpt_grpc.errors import SettingsError


def run(parsed: argparse.Namespace) -> None:
    """Prints the script. Raises SettingsError if shtab is not installed."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise SettingsError(
            "completion requires shtab; install the extra 'completion' (see docs/install.md)"
        ) from error
    for action in _actions(parsed.root):
        if "FILE" in str(action.metavar):
            action.complete = shtab.FILE
    print(shtab.complete(parsed.root, parsed.shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Yields the flags and arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
