"""Numbers in JSON Schemas, some of which llguidance reads or enforces as others.

It reads a number exactly if its digits make up an integer that a double represents and its exponent is small. Other
constants are refused, and other bounds are narrowed a little. Of a bound that is excluded and an integer, it allows the
integer itself where the other bound is less than 1 away, so that such a bound becomes the next number.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, TypeGuard

from mpt_grpc.text.schema_checks import error
from mpt_grpc.text.schema_places import Inside, Place
from mpt_grpc.text.schema_unions import MAX_EXACT

_BOUNDS = {"maximum": 1, "exclusiveMaximum": 1, "minimum": -1, "exclusiveMinimum": -1}
"""The keywords of bounds, each with the sign of the numbers that it excludes."""
_MAX_DIGITS = 15
_MIN_EXPONENT = -22


def check_numbers(schema: dict[str, Any], place: Place) -> None:
    """Refuses numbers that llguidance would turn into others."""
    for name in ("const", "enum", "multipleOf"):
        for where, number in _numbers(schema.get(name), Inside(place, name)):
            _check_size(number, where)
            if not _is_read_exactly(number):
                raise error(where, f"{number}: has too many digits to be exact: use at most {_MAX_DIGITS}, or a string")
    for name, sign in _BOUNDS.items():
        for where, number in _numbers(schema.get(name), Inside(place, name)):
            if number * sign < 0:  # other bounds are narrowed
                _check_size(number, where)


def narrow_bounds(schema: dict[str, Any]) -> None:
    """Narrows bounds to numbers that llguidance enforces exactly, which only excludes values that no text needs."""
    for name, inclusive in (("exclusiveMaximum", "maximum"), ("exclusiveMinimum", "minimum")):
        # As in draft 4 and in OpenAPI 3.0, where it says whether the other bound is excluded.
        if isinstance(schema.get(name), bool) and schema.pop(name) and inclusive in schema:
            schema[name] = schema.pop(inclusive)
    for name, sign in _BOUNDS.items():
        value, inclusive = schema.get(name), name.removeprefix("exclusive").lower()
        if not _is_number(value):
            continue
        if value * sign > MAX_EXACT:
            bound: float = MAX_EXACT * sign
        elif name != inclusive and value == int(value) and value * sign <= 0:
            bound = _next(int(value), -sign)
        else:
            schema[name] = value if _is_read_exactly(value) else _inward(value, sign)
            continue
        del schema[name]
        if not _is_number(schema.get(inclusive)) or schema[inclusive] * sign > bound * sign:
            schema[inclusive] = bound


def bound_integers(schema: dict[str, Any]) -> None:
    """Bounds integers by those that doubles represent, since a weak model would go on with digits."""
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    if "integer" not in types or "number" in types or "multipleOf" in schema:  # with which bounds would be costly
        return
    for keyword, bound in (("minimum", -MAX_EXACT), ("maximum", MAX_EXACT)):
        if schema.keys().isdisjoint((keyword, f"exclusive{keyword.capitalize()}")):
            schema[keyword] = bound


def _is_read_exactly(number: float) -> bool:
    if isinstance(number, int):
        return True
    _, digits, exponent = Decimal(repr(number)).as_tuple()
    return int("".join(map(str, digits))) <= MAX_EXACT and int(exponent) >= _MIN_EXPONENT


def _next(number: int, sign: int) -> float:
    """Returns the number after an integer, in the direction of a sign, with as many digits as are exact."""
    exponent = min(0, len(str(abs(number))) - _MAX_DIGITS)
    return float(Decimal(number) + sign * Decimal(10) ** exponent)


def _inward(bound: float, sign: int) -> float:
    """Returns a bound with fewer digits that excludes no less."""
    rounding = ROUND_FLOOR if sign > 0 else ROUND_CEILING
    rounded = Context(prec=_MAX_DIGITS, rounding=rounding).create_decimal(repr(bound))
    if int(rounded.as_tuple().exponent) < _MIN_EXPONENT:
        rounded = rounded.quantize(Decimal(10) ** _MIN_EXPONENT, rounding=rounding)
    return float(rounded)


def _check_size(number: float, place: Place) -> None:
    if not abs(number) <= sys.float_info.max:
        raise error(place, "the number is beyond the range of a double: use a string")
    if abs(number) > MAX_EXACT and number == int(number):
        raise error(place, f"{number}: integers beyond {MAX_EXACT} are not supported: use a string")


def _numbers(value: Any, place: Place) -> Iterator[tuple[Place, float]]:
    """Yields the numbers in a JSON value with their places."""
    if _is_number(value):
        yield place, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, Inside(place, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, Inside(place, key))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
