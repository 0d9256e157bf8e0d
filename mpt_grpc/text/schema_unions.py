"""Decides whether the branches of `oneOf` exclude each other, so that `anyOf` is equivalent.

Branches differ by their types, by constants, by a property with different types or constants, or by a property that one
requires and another excludes. Where that only holds for some of their values, they are narrowed to those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

MAX_EXACT = (1 << 53) - 1
"""The largest integer up to which a double represents every integer."""
_MAX_COMPARED = 100
"""The most branches that are compared in pairs."""
_TYPES = frozenset("array boolean null number object string".split())


@dataclass
class Narrowing:
    """What a branch has to allow less, so that its values match no other branch: they become objects."""

    required: list[str] = field(default_factory=list)
    """Properties that the branch has to require."""
    excluded: list[str] = field(default_factory=list)
    """Properties that the branch has to exclude."""


def narrowings(branches: Sequence[dict[str, Any]], types: Any) -> list[Narrowing] | None:
    """Returns how to narrow each branch so that no value matches two, or None if that is not known.

    The branches are resolved: without `$ref`. `types` is the type beside `oneOf`, or None.
    """
    known = [_Branch(branch) for branch in branches]
    result = [Narrowing() for _ in branches]
    if all(branch.constants for branch in known):
        num_constants = sum(len(branch.constants) for branch in known)
        return result if len(frozenset().union(*(branch.constants for branch in known))) == num_constants else None
    if len(branches) > _MAX_COMPARED:
        return None
    for one, other in combinations(range(len(branches)), 2):
        if not _exclusive(known[one], result[one], known[other], result[other], types):
            return None
    return result


class _Branch:
    """What distinguishes a schema from others, found once however many these are."""

    def __init__(self, schema: Any) -> None:
        self._schema: dict[str, Any] = schema if isinstance(schema, dict) else {}
        self.is_known = isinstance(schema, dict)
        self.has_type = "type" in self._schema

    @cached_property
    def types(self) -> frozenset[str]:
        return _types(self._schema.get("type"))

    @cached_property
    def constants(self) -> frozenset[str]:
        """The values that the schema allows, as JSON; empty if it may allow others."""
        return _constants(self._schema)

    @cached_property
    def required(self) -> Mapping[str, None]:
        """The names of the properties that the schema requires, in their order."""
        names = self._schema.get("required")
        listed = names if isinstance(names, list) else []
        return dict.fromkeys(name for name in listed if isinstance(name, str))

    @cached_property
    def properties(self) -> Mapping[str, _Branch]:
        properties = self._schema.get("properties")
        return {name: _Branch(part) for name, part in properties.items()} if isinstance(properties, dict) else {}

    def excludes(self, name: str) -> bool:
        """Whether no object with this property matches the schema."""
        if name in self.properties:
            return self._schema["properties"][name] is False
        return self._schema.get("additionalProperties") is False and "patternProperties" not in self._schema


def _exclusive(one: _Branch, narrow: Narrowing, other: _Branch, narrow_other: Narrowing, beside: Any) -> bool:
    """Whether two branches exclude each other after what this adds to their narrowings."""
    if _differ(one, other):
        return True
    common = one.types & other.types & _types(beside)
    # Where neither has a type, values that are not objects match both, so none of them is valid.
    are_objects = common == {"object"}
    if not are_objects and (one.has_type or other.has_type):
        return False
    different = [name for name in one.properties if _differ(one.properties[name], other.properties.get(name))]
    if are_objects and any(name in one.required or name in other.required for name in different):
        return True
    if different:
        narrow.required.append(different[0])
        narrow_other.required.append(different[0])
        return True
    if are_objects and (any(map(other.excludes, one.required)) or any(map(one.excludes, other.required))):
        return True
    only_one = next((name for name in one.required if name not in other.required), None)
    only_other = next((name for name in other.required if name not in one.required), None)
    if only_one is None or only_other is None:
        return False
    narrow.excluded.append(only_other)
    narrow_other.excluded.append(only_one)
    return True


def _differ(one: _Branch, other: _Branch | None) -> bool:
    """Whether no value matches both schemas, because of their types or constants."""
    if other is None or not one.is_known or not other.is_known:
        return False
    if one.constants and other.constants:
        return one.constants.isdisjoint(other.constants)
    return one.types.isdisjoint(other.types)


def _types(types: Any) -> frozenset[str]:
    if isinstance(types, str):
        types = [types]
    if not isinstance(types, list):
        return _TYPES
    return frozenset("number" if name == "integer" else str(name) for name in types)


def _constants(schema: dict[str, Any]) -> frozenset[str]:
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or any(isinstance(value, list | dict) for value in values):
        return frozenset()
    # 1 and 1.0 are equal, but not 1 and true.
    return frozenset(
        json.dumps(float(value) if type(value) is int and abs(value) <= MAX_EXACT else value) for value in values
    )
