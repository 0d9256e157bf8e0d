"""Reads JSON of callers, with errors in their terms instead of Python's."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

_MAX_ECHOED = 100
_MAX_DIGITS = 640
"""The most digits of an integer: Python's time for reading and writing one, in which it does nothing else, grows with
their square."""
_REASONS = (
    ("Expecting value", "a value is missing"),
    ("Expecting property name", "a name in double quotes is missing"),
    ("Expecting ':'", "a colon is missing"),
    ("Expecting ','", "a comma or a closing bracket is missing"),
    ("Illegal trailing comma", "a comma is followed by no value"),
    ("Extra data", "the value ends, but the text goes on"),
    ("Unterminated string", "the string has no end"),
    ("Invalid control character", "a control character is not escaped"),
    ("Invalid", "there is no such escape"),
)
"""The beginnings of Python's errors, and what each means. Python 3.13 added the one about commas."""


def parse_json(text: str) -> Any:
    """Returns the value. Raises ValueError, which says why the text is not valid JSON, or RecursionError.

    NaN and infinity, which Python accepts, are not JSON. A number may not exceed a double, or have too many digits.
    """
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark")
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason = next((reason for start, reason in _REASONS if error.msg.startswith(start)), "the syntax is wrong")
        raise ValueError(f"{reason} at line {error.lineno}, column {error.colno}") from error


def parse_object(text: str, max_depth: int) -> dict[str, Any]:
    """Returns a JSON object. Raises ValueError, which says what is wrong with the text.

    max_depth: the most levels of arrays and objects.
    """
    try:
        value = parse_json(text)
    except RecursionError as error:
        raise ValueError(too_deep(max_depth)) from error
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    if is_deeper_than(value, max_depth):
        raise ValueError(too_deep(max_depth))
    if not is_unicode(value):
        raise ValueError("not valid Unicode: remove lone surrogates")
    return value


def too_deep(max_depth: int) -> str:
    """Returns why a text with more levels of arrays and objects is refused."""
    return f"nested more than {max_depth} levels deep: simplify it"


def is_deeper_than(value: object, num_levels: int) -> bool:
    """Whether a JSON value has more levels of arrays and objects than that; does not recurse."""
    level = [value]
    for _ in range(num_levels):
        level = [
            child
            for parent in level
            if isinstance(parent, list | dict)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    return any(isinstance(value, list | dict) for value in level)


def is_unicode(value: Any) -> bool:
    """Whether the texts in a JSON value have no lone surrogates, which may have been escaped."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(number: str) -> int:
    """Returns an integer. Raises ValueError if it has too many digits."""
    if len(number.removeprefix("-")) > _MAX_DIGITS:
        raise ValueError(f"an integer has more than {_MAX_DIGITS} digits")
    return int(number)


def _finite(number: str) -> float:
    """Returns a number with a fraction or an exponent. Raises ValueError if no double is as large."""
    value = float(number)
    if math.isinf(value):
        shown = number if len(number) <= _MAX_ECHOED else f"{number[:_MAX_ECHOED]}…"
        raise ValueError(f"{shown} is beyond the range of a double")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


_DECODER = json.JSONDecoder(parse_int=_short, parse_float=_finite, parse_constant=_refuse_constant)
