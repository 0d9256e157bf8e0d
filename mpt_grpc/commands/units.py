"""Values of flags: durations such as `30s`, sizes such as `1GiB`, and numbers above 0."""

from __future__ import annotations

import argparse
import re
from typing import TypeVar

_Number = TypeVar("_Number", int, float)

_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def seconds(text: str) -> float:
    """Parses a duration."""
    return _parsed(text, _SECONDS, "30s, 500ms or 2m")


def num_bytes(text: str) -> int:
    """Parses a size in bytes."""
    return int(_parsed(text, _BYTES, "1GiB, 512MiB or 2GB"))


def positive_int(text: str) -> int:
    """Parses a whole number above 0."""
    return _positive(text, int)


def positive_float(text: str) -> float:
    """Parses a number above 0."""
    return _positive(text, float)


def _positive(text: str, kind: type[_Number]) -> _Number:
    try:
        number = kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return number


def _parsed(text: str, units: dict[str, float] | dict[str, int], examples: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)", text.strip())
    names = {name.lower(): factor for name, factor in units.items()}
    if match is None or match[2].lower() not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number with a unit, such as {examples}")
    return float(match[1]) * names[match[2].lower()]
