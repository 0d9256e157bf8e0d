"""Decides whether the branches of `oneOf` exclude each other, so that `anyOf` is equivalent.

Branches differ by their types, by constants, by a property with different types or constants, or by a property that one
requires and another excludes. Where that only holds for some of their values, they are narrowed to those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

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
    result = [Narrowing() for _ in branches]
    for one, other in combinations(range(len(branches)), 2):
        if not _exclusive(branches[one], result[one], branches[other], result[other], types):
            return None
    return result


def _exclusive(
    one: dict[str, Any], narrow: Narrowing, other: dict[str, Any], narrow_other: Narrowing, beside: Any
) -> bool:
    """Whether two branches exclude each other after what this adds to their narrowings."""
    if _differ(one, other):
        return True
    common = _types(one) & _types(other) & _types({"type": beside} if beside else {})
    # Where neither has a type, values that are not objects match both, so none of them is valid.
    are_objects = common == {"object"}
    if not are_objects and ("type" in one or "type" in other):
        return False
    needs, other_needs = _required(one), _required(other)
    different = [name for name in _properties(one) if _differ(_properties(one)[name], _properties(other).get(name))]
    if are_objects and any(name in (*needs, *other_needs) for name in different):
        return True
    if different:
        narrow.required.append(different[0])
        narrow_other.required.append(different[0])
        return True
    if are_objects and (any(_excludes(other, n) for n in needs) or any(_excludes(one, n) for n in other_needs)):
        return True
    only_one = [name for name in needs if name not in other_needs]
    only_other = [name for name in other_needs if name not in needs]
    if not only_one or not only_other:
        return False
    narrow.excluded.append(only_other[0])
    narrow_other.excluded.append(only_one[0])
    return True


def _differ(one: Any, other: Any) -> bool:
    """Whether no value matches both schemas, because of their types or constants."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    constants, other_constants = _constants(one), _constants(other)
    if constants and other_constants:
        return not constants & other_constants
    return not _types(one) & _types(other)


def _types(schema: dict[str, Any]) -> frozenset[str]:
    types = schema.get("type")
    if isinstance(types, str):
        types = [types]
    if not isinstance(types, list):
        return _TYPES
    return frozenset("number" if name == "integer" else str(name) for name in types)


def _constants(schema: dict[str, Any]) -> frozenset[str]:
    """Returns the values that a schema allows, as JSON; empty if it may allow others."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or any(isinstance(value, list | dict) for value in values):
        return frozenset()
    # 1 and 1.0 are equal, but not 1 and true.
    return frozenset(json.dumps(float(value) if type(value) is int else value) for value in values)


def _required(schema: dict[str, Any]) -> list[str]:
    names = schema.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _excludes(schema: dict[str, Any], name: str) -> bool:
    """Whether no object with this property matches the schema."""
    if name in _properties(schema):
        return _properties(schema)[name] is False
    return schema.get("additionalProperties") is False and "patternProperties" not in schema
