"""Reads the JSON that callers write, with errors in their words and not in those of Python."""

from __future__ import annotations

import json
import math
import sys
from typing import Any, NoReturn

_MAX_ECHOED = 100


def parse_json(text: str) -> Any:
    """Returns the value. Raises ValueError, which says why the text is not valid JSON, or RecursionError.

    NaN and infinity, which Python accepts, are not JSON. A number may not exceed a double, or have too many digits.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "int_max_str_digits" not in str(error):
            raise
        raise ValueError(f"an integer has more than {sys.get_int_max_str_digits()} digits") from error


def _finite(number: str) -> float:
    """Returns a number with a fraction or an exponent. Raises ValueError if no double is as large."""
    value = float(number)
    if math.isinf(value):
        shown = number if len(number) <= _MAX_ECHOED else f"{number[:_MAX_ECHOED]}…"
        raise ValueError(f"{shown} is beyond the range of a double")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse_constant)
