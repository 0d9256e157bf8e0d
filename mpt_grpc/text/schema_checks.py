"""Refuses JSON Schemas whose keywords have values of the wrong type, or numbers that a double does not represent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from mpt_grpc.text.schema_places import Inside, Place, pointer
from mpt_grpc.text.schema_unions import MAX_EXACT

SIZES = (
    "minItems",
    "maxItems",
    "minLength",
    "maxLength",
    "minProperties",
    "maxProperties",
    "minContains",
    "maxContains",
)


class UnsupportedSchemaError(ValueError):
    """A schema that cannot be enforced exactly; the text has the JSON Pointer of the place."""


def check_types(schema: dict[str, Any], place: Place) -> None:
    """Refuses values that the rewriting could not compute with."""
    for name in SIZES:
        size = schema.get(name, 0)
        if not isinstance(size, int | float) or isinstance(size, bool) or not 0 <= size <= MAX_EXACT or size % 1:
            raise error(Inside(place, name), f"must be a whole number from 0 to {MAX_EXACT}")
    for name in ("properties", "dependencies", "dependentRequired", "dependentSchemas"):
        if not isinstance(schema.get(name, {}), dict):
            raise error(Inside(place, name), "must be an object")
    if not isinstance(schema.get("allOf", []), list):
        raise error(Inside(place, "allOf"), "must be a list of schemas")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise error(Inside(place, "required"), "must be a list of property names")


def check_numbers(schema: dict[str, Any], place: Place) -> None:
    """Refuses numbers that llguidance would turn into others."""
    for name in ("const", "enum", "multipleOf"):
        for where, number in _numbers(schema.get(name), Inside(place, name)):
            _check_exact(number, where)
    for name, sign in (("minimum", 1), ("exclusiveMinimum", 1), ("maximum", -1), ("exclusiveMaximum", -1)):
        for where, number in _numbers(schema.get(name), Inside(place, name)):
            if number * sign > 0:  # other bounds are narrowed
                _check_exact(number, where)


def _check_exact(number: float, place: Place) -> None:
    if isinstance(number, int) and abs(number) > MAX_EXACT:
        raise error(place, f"{number}: integers beyond {MAX_EXACT} are not supported: use a string")
    if not math.isfinite(number):
        raise error(place, "the number is beyond the range of a double: use a string")


def _numbers(value: Any, place: Place) -> Iterator[tuple[Place, float]]:
    """Yields the numbers in a JSON value with their places."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield place, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, Inside(place, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, Inside(place, key))


def error(place: Place, why: str) -> UnsupportedSchemaError:
    return UnsupportedSchemaError(f"{pointer(place)}: {why}")
