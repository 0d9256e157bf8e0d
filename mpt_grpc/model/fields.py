"""The fields of a JSON object, each judged by what its value does; whatever is not supported is collected.

A `LimitedField` describes a field of which only some values are implemented. A value that switches a field off is
accepted whether or not the field is known.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

MAX_SIZE = 1 << 24
"""The largest width, number of layers or vocabulary; far beyond any model, and small enough to multiply."""

_NAME = re.compile(r"[\w.\-]{1,100}")
_MAX_SHOWN = 500
"""How many characters of a value an error shows."""


@dataclass(frozen=True)
class LimitedField:
    """A field of which only some values are implemented."""

    name: str
    """The path of the field, with a dot between the object and the field."""
    supported: str
    """The implemented values, in words."""
    needs: str
    """What other values would need."""
    is_supported: Callable[[Any], bool]


def _alternatives(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def one_of(name: str, values: tuple[Any, ...], needs: str) -> LimitedField:
    """Returns a field with a few implemented values; texts are compared without regard to case."""

    def is_supported(value: Any) -> bool:
        folded = value.lower() if isinstance(value, str) else value
        return any(folded is other or (type(folded) is type(other) and folded == other) for other in values)

    words = {None: "null", True: "true", False: "false"}
    return LimitedField(name, _alternatives(f"{words.get(value, value)}" for value in values), needs, is_supported)


def changes_nothing(value: Any) -> bool:
    """Whether the value of an unknown field switches it off: null, false, or an empty text, list or object."""
    return value is None or value is False or value in ("", [], {})


def is_number(value: Any, least: float = -sys.float_info.max) -> bool:
    """Whether a value is a finite number from `least` on that fits a float; JSON allows integers of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= sys.float_info.max


class Fields:
    """The fields of an object by their names, and the obstacles found in them so far."""

    def __init__(self, values: dict[str, Any], given_name: Callable[[str], str] = str) -> None:
        """given_name: returns the name that a field has in the file."""
        self.values = values
        self.obstacles: list[str] = []
        self._given_name = given_name

    def refuse(self, name: str, value: object, why: str) -> None:
        name = self._given_name(name)
        shown = repr(value)
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
        self.obstacles.append(f"{name if _NAME.fullmatch(name) else repr(name[:_MAX_SHOWN])}: {shown}: {why}")

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def boolean(self, name: str, default: bool) -> bool:
        """Returns a switch, of which null leaves one off that is off by default."""
        value = self.get(name, default)
        if value is None and not default:
            return False
        if not isinstance(value, bool):
            self.refuse(name, value, "expected true or false")
            return default
        return value

    def size(self, name: str, default: int, largest: int = MAX_SIZE) -> int:
        value = self.get(name, default)
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not is_whole or not 1 <= value <= largest:
            self.refuse(name, value, f"expected an integer from 1 to {largest}")
            return default
        return int(value)

    def number(self, name: str) -> float | None:
        value = self.get(name)
        if value is None:
            return None
        if not is_number(value, 0):
            self.refuse(name, value, "expected a non-negative number or null")
            return None
        return float(value)

    def check_limited(self, limited: Iterable[LimitedField]) -> None:
        """Refuses the values that are not implemented."""
        for field in limited:
            if field.name in self.values and not field.is_supported(value := self.values[field.name]):
                self.refuse(field.name, value, f"would need {field.needs}; supported: {field.supported}")

    def check_unknown(
        self, read: Collection[str], limited: Iterable[LimitedField], is_ignored: Callable[[str], bool]
    ) -> None:
        """Refuses the fields that are neither known, nor metadata, nor switched off.

        Libraries write their internal state with a leading underscore, and their versions.
        """
        known = {*read, *(field.name for field in limited)}
        for name, value in self.values.items():
            leaf = name.rpartition(".")[2]
            is_metadata = leaf.startswith("_") or leaf.endswith("_version")
            if name not in known and not is_metadata and not is_ignored(name) and not changes_nothing(value):
                inner = next((path for path in sorted(known) if path.endswith(f".{name}")), None)
                remedy = f"move it into {inner.partition('.')[0]}" if inner else "remove it if it does not"
                self.refuse(name, value, f"unknown field, which may change the computation; {remedy}")
