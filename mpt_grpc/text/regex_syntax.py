"""Finds the syntax of regular expressions that llguidance lacks or reads as another, for errors that name it."""

from __future__ import annotations

import re

# An escape, a character class, the beginning of a group, or a possessive quantifier. A class that is not closed extends
# to the end, and nothing is tried twice: otherwise the time would grow with the square of the length.
_SYNTAX = re.compile(
    r"\\(?P<escape>.?)|\[\^?\]?(?:\\.|\[:\w++:\]|[^\]\\])*+\]?|\(\?(?P<group>P[=>]|R\)|<?[=!]|[#>|&(0-9])"
    r"|(?P<possessive>(?:[*+?]|\{\d++(?:,\d*+)?\})\+)",
    re.S,
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def unsupported_syntax(pattern: str) -> str | None:
    """Returns why a regular expression is not supported and what to do, or None if nothing is found."""
    for found in _SYNTAX.finditer(pattern):
        escape, group = found["escape"], found["group"]
        if escape == "":
            return "ends in a single backslash: write two to match one"
        if escape in ("b", "B"):
            return f'word boundaries ("\\{escape}") are not supported: write out the characters around them'
        if escape == "0":
            return 'octal escapes ("\\0") are not supported: write "\\x00"'
        if found["possessive"] is not None:
            return f'possessive quantifiers ("{found["possessive"]}") are not supported: remove the last "+"'
        if (escape and escape in "123456789k") or group == "P=":
            return "backreferences are not supported: write the text out again"
        # An escape outside of classes is only the beginning of what is found.
        if half := _SURROGATE.search(pattern, found.start(), max(found.end(), found.start() + 4)):
            return f'halves of surrogate pairs ("{half[0]}…") are not supported: write the character itself'
        if group in ("=", "!", "<=", "<!"):
            return f'look-around ("(?{group}") is not supported: remove it'
        if group is not None:
            return f'groups that begin with "(?{group.rstrip(")")}" are not supported: remove them'
    return None
