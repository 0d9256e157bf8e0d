"""Text that callers wrote, in an operator's terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns the text without characters that a terminal may obey, such as those of escape sequences."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
