"""Refuses JSON Schemas whose keywords have values of the wrong type."""

from __future__ import annotations

import json
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
TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")


class UnsupportedSchemaError(ValueError):
    """A schema that cannot be enforced exactly; the text has the JSON Pointer of the place."""


def check_types(schema: dict[str, Any], place: Place) -> None:
    """Refuses values that the rewriting could not compute with."""
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in TYPES:
            raise error(Inside(place, "type"), f"{json.dumps(kind)} is not a type: use {', '.join(TYPES)}")
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


def error(place: Place, why: str) -> UnsupportedSchemaError:
    return UnsupportedSchemaError(f"{pointer(place)}: {why}")
