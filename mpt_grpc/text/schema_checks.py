"""Refuses JSON Schemas whose keywords have values of the wrong type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mpt_grpc.text.schema_places import IDS, LISTS, MAPS, SINGLE, Inside, Place, pointer
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
TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_NUMBER = int | float
_KINDS: Mapping[str, tuple[Any, str]] = {
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), (list, "a list of schemas")),
    **dict.fromkeys(("minimum", "maximum", "multipleOf"), (_NUMBER, "a number")),
    **dict.fromkeys(("properties", "patternProperties"), (dict, "an object")),
    **dict.fromkeys(("dependencies", "dependentRequired", "dependentSchemas"), (dict, "an object")),
    **dict.fromkeys(("pattern", "format"), (str, "a string")),
    "enum": (list, "a list"),
}
"""The types of keywords' values in Python, and in words."""
EFFECTIVE = frozenset((
    *MAPS, *LISTS, *SINGLE, *IDS, *SIZES, *_KINDS, "$dynamicRef", "$recursiveRef", "$ref", "$schema", "const",
    "exclusiveMaximum", "exclusiveMinimum", "required", "type", "uniqueItems",
))  # fmt: skip
"""The keywords on which it depends what conforms."""


class UnsupportedSchemaError(ValueError):
    """A schema that cannot be enforced exactly; the text has the JSON Pointer of the place."""


def check_types(schema: dict[str, Any], place: Place) -> None:
    """Refuses values that the rewriting could not compute with."""
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in TYPES:
            raise error(Inside(place, "type"), f"{json.dumps(kind)} is not a type: use {', '.join(TYPES)}")
    for name, (kind, words) in _KINDS.items():
        if name in schema and (
            not isinstance(schema[name], kind) or (kind is _NUMBER and isinstance(schema[name], bool))
        ):
            raise error(Inside(place, name), f"must be {words}")
    for name in SIZES:
        size = schema.get(name, 0)
        if not isinstance(size, int | float) or isinstance(size, bool) or not 0 <= size <= MAX_EXACT or size % 1:
            raise error(Inside(place, name), f"must be a whole number from 0 to {MAX_EXACT}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise error(Inside(place, "required"), "must be a list of property names")


def error(place: Place, why: str) -> UnsupportedSchemaError:
    return UnsupportedSchemaError(f"{pointer(place)}: {why}")
