"""The places in a JSON Schema: their names, and those to which references lead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import unquote

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
    """Yields each object in a schema except the definitions that it does not refer to."""
    found: list[Any] = [root]
    seen = set()
    while found:
        value = found.pop()
        if not isinstance(value, list | dict) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, list):
            found += value
            continue
        yield value
        found += [part for key, part in value.items() if key not in ("$defs", "definitions")]
        if "$ref" in value:
            found.append(resolved(root, value["$ref"]))


def targets(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the objects to which the references anywhere in a schema lead."""
    found: list[Any] = [root]
    while found:
        value = found.pop()
        if isinstance(value, list):
            found += value
        elif isinstance(value, dict):
            found += value.values()
            if "$ref" in value:
                yield resolved(root, value["$ref"])


def resolved(root: Any, reference: Any) -> dict[str, Any]:
    """Returns the definition that a reference within the schema leads to, or an empty one."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return {}
    value = root
    for part in unquote(reference).removeprefix("#/").split("/"):
        if isinstance(value, list):
            value = value[int(part)] if _INDEX.fullmatch(part) and int(part) < len(value) else None
        else:
            value = value.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
