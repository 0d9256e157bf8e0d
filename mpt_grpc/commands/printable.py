"""Text of callers and models in a terminal, which may obey what it contains."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Returns the text without characters that a terminal may obey, such as those of escape sequences."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def generated(text: str) -> str:
    """Returns generated text, in a terminal without control characters other than tabs and line breaks."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # a closed output is None
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if is_terminal else text


def print_pieces(pieces: Iterable[str]) -> None:
    """Prints generated text as it comes, and ends its last line, even if an error ends the text."""
    is_begun = False
    try:
        for piece in pieces:
            print(generated(piece), end="", flush=True)
            is_begun = True
        is_begun = True
    finally:
        if is_begun:
            print()
