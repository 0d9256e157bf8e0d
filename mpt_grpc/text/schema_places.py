"""The places in a JSON Schema: their names, and those to which references lead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import unquote

MAPS = ("properties", "patternProperties", "dependentSchemas", "dependencies")
"""The keywords whose values map names to schemas, except for those of definitions."""
LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
SINGLE = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
IDS = ("$id", "id")
"""The keywords of a schema's ID; the second is that of draft 4."""
_INDEX = re.compile("0|[1-9][0-9]{0,8}", re.ASCII)


class Inside(NamedTuple):
    """A place inside of another one. It names the keys above it once for all places below them, unlike a pointer."""

    parent: Place
    key: str | int


Place: TypeAlias = Inside | None
"""None is the whole schema."""


def pointer(place: Place) -> str:
    """Returns the JSON Pointer of a place."""
    keys = []
    while place is not None:
        keys.append(f"/{escaped(str(place.key))}")
        place = place.parent
    return "".join(reversed(keys))


def escaped(key: str) -> str:
    """Returns a key as JSON Pointers contain it."""
    return key.replace("~", "~0").replace("/", "~1")


def reachable(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a schema, the schemas inside it, and those to which their references lead."""
    found: list[Any] = [root]
    seen = set()
    while found:
        schema = found.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema
        found += (part for part, _ in inner(root, schema, None))


def inner(root: dict[str, Any], schema: dict[str, Any], place: Place) -> Iterator[tuple[Any, Place]]:
    """Yields what should be schemas directly inside of one, and what its reference leads to, with their places."""
    for name, value in schema.items():
        if name in MAPS and isinstance(value, dict):
            yield from ((part, Inside(Inside(place, name), key)) for key, part in value.items())
        elif name in LISTS and isinstance(value, list):
            yield from ((part, Inside(Inside(place, name), index)) for index, part in enumerate(value))
        elif name in SINGLE:
            yield value, Inside(place, name)
        elif name == "$ref":
            yield resolved(root, value), _target(value)


def is_resource(schema: dict[str, Any], *keywords: str) -> bool:
    """Whether references inside of a schema begin at it, because it has an ID under one of these keywords."""
    ids = [schema.get(keyword) for keyword in keywords]
    return any(isinstance(one, str) and not one.startswith("#") for one in ids)


def keys_of(reference: str) -> list[str]:
    """Returns the keys that lead from the whole schema to what a reference within it refers to."""
    parts = unquote(reference).removeprefix("#/").split("/")
    return [part.replace("~1", "/").replace("~0", "~") for part in parts]


def _target(reference: Any) -> Place:
    place: Place = None
    for key in keys_of(reference) if isinstance(reference, str) else ():
        place = Inside(place, key)
    return place


def resolved(root: Any, reference: Any) -> Any:
    """Returns the target of a reference within the schema, or None if there is nothing."""
    if reference in ("", "#"):
        return root
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    value = root
    for part in keys_of(reference):
        if isinstance(value, dict) and (value is root or not is_resource(value, *IDS)):
            value = value.get(part)
        elif isinstance(value, list) and _INDEX.fullmatch(part) and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value
