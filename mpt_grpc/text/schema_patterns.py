r"""Narrows the patterns of JSON Schemas to what every validator accepts and llguidance enforces.

llguidance allows a quote and a backslash wherever a class contains all control characters, even if it excludes those
two, so that classes lose U+0000 here. Its \w, \d and \s are those of ASCII, as in ECMAScript; Python's are those of
Unicode. Characters about which the two differ match neither a class nor its complement.
"""

from __future__ import annotations

import re
from typing import Any

_TOKEN = re.compile(r"\\[pP](?:\{[^}]{0,64}\}|.)|\\.|\[:\^?\w+:\]|(?P<open>\[\^?\]?)|(?P<close>\])|.", re.S)
_NARROWED = {
    r"\W": r"[\W&&[^\p{L}\p{N}]]",
    r"\D": r"[\D&&[^\p{Nd}]]",
    r"\S": r"[\S&&[^\x1c-\x1f\x85]]",
}
_WIDENED = {r"\w": r"[\w\p{L}\p{N}]", r"\d": r"\p{Nd}", r"\s": r"[\s\x1c-\x1f\x85]"}
_WITHOUT_NUL = r"[{}&&[^\x00]]"


def narrow_patterns(schema: dict[str, Any]) -> None:
    """Narrows the patterns of strings and of properties' names."""
    if isinstance(schema.get("pattern"), str):
        schema["pattern"] = narrowed(schema["pattern"])
    if isinstance(schema.get("patternProperties"), dict):
        schema["patternProperties"] = {narrowed(name): part for name, part in schema["patternProperties"].items()}


def narrowed(pattern: str) -> str:
    """Returns a pattern that matches no more texts. One with a class that is not closed stays as it is."""
    pieces: list[str] = []
    open_classes: list[bool] = []
    """For each class that is open, whether it is inside of an odd number of complements."""
    for token in _TOKEN.finditer(pattern):
        text, is_complement = token[0], bool(open_classes and open_classes[-1])
        if token["open"]:
            pieces.append(text if open_classes else f"[{text}")
            open_classes.append(is_complement ^ text.startswith("[^"))
        elif token["close"] and open_classes:
            open_classes.pop()
            pieces.append(text if open_classes else r"]&&[^\x00]]")
        else:
            text = (_WIDENED if is_complement else _NARROWED).get(text, text)
            is_property = text[:2] in (r"\p", r"\P") and not open_classes
            pieces.append(_WITHOUT_NUL.format(text) if is_property else text)
    return pattern if open_classes else "".join(pieces)
