"""Refuses JSON Schemas that only infinite values match: an output under one could never end.

llguidance finds other contradictions when it compiles a schema. Whether a value can be finite depends on what it has to
contain: required properties, and the items that `minItems` counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeAlias

from mpt_grpc.text.refusals import IMPOSSIBLE, TOO_COSTLY, shortened
from mpt_grpc.text.schema_checks import TYPES, UnsupportedSchemaError
from mpt_grpc.text.schema_places import reachable, resolved

_Schema: TypeAlias = dict[str, Any]
_Need: TypeAlias = tuple[str, Any]
"""The name of a property, or the keyword of items, and the schema of what a value has to contain there.

Without a name, the schema is one that the value itself has to match.
"""
_MAX_WORK = 100_000
"""How many schemas are looked at, which takes some 0.2 s of processor time. Ordinary ones need a few hundred."""
_MAX_NAME = 40


def check_recursion(root: _Schema) -> None:
    """Raises UnsupportedSchemaError if only infinite values match a schema, as `rewrite` returns it."""
    schemas = list(reachable(root))
    if any("$ref" in schema for schema in schemas):
        _Recursion(root).check(schemas)


class _Recursion:
    def __init__(self, root: _Schema) -> None:
        self._root = root
        self._finite: set[int] = set()
        """The identities of the schemas that are known to have a finite value."""
        self._targets: dict[str, Any] = {}
        """What references lead to."""
        self._work = 0

    def check(self, schemas: list[_Schema]) -> None:
        """Finds the schemas with finite values: those that need no other, then those that need only these, and so on.

        Raises UnsupportedSchemaError if the root is not among them.
        """
        num_found = -1
        while len(self._finite) > num_found and id(self._root) not in self._finite:
            num_found = len(self._finite)
            schemas.reverse()  # a chain of definitions takes two passes, in whichever order they are
            self._finite.update(
                id(schema) for schema in schemas if id(schema) not in self._finite and self._need(schema) is None
            )
        if (need := self._need(self._root)) is not None:
            raise UnsupportedSchemaError(self._reason(need))

    def _reason(self, need: _Need) -> str:
        """Returns why the root, which needs this, has no finite value."""
        name, schema = need
        seen = set()
        while isinstance(schema, dict) and id(schema) not in seen:
            seen.add(id(schema))
            next_name, schema = self._need(schema) or ("", True)
            name = next_name or name
        if not name:
            return IMPOSSIBLE
        where = "inside of itself without an end" if isinstance(schema, dict) else "where nothing is allowed"
        shown = json.dumps(shortened(name, _MAX_NAME), ensure_ascii=False)
        return f"no output can satisfy it: {shown} is required {where}: make it optional"

    def _need(self, schema: _Schema) -> _Need | None:
        """Returns what each value of a schema has to contain or match and is not known to be finite, or None."""
        parts, choices = self._conjunction(schema)
        if (need := self._need_of(parts)) is not None:
            return need
        members = [*schema.get("allOf", ()), *([self._target(schema)] if "$ref" in schema else ())]
        for member in members:
            if self._is_unknown(("", member)):
                return "", member
        for branches in choices:
            need = "", False
            for branch in branches:
                if (need := self._need_of_branch(parts, branch)) is None:
                    break
            if need is not None:
                return need
        return None

    def _need_of_branch(self, parts: list[_Schema], branch: Any) -> _Need | None:
        """Returns what each value that matches some schemas and a branch needs, or None."""
        need = self._need_of([*parts, *self._conjunction(branch)[0]])
        return ("", branch) if need is None and self._is_unknown(("", branch)) else need

    def _conjunction(self, schema: Any) -> tuple[list[_Schema], list[list[Any]]]:
        """Returns the schemas that hold together, through `$ref` and `allOf`, and the choices beside them."""
        pending, seen = [schema], set()
        parts, choices = [], []
        while pending:
            schema = pending.pop()
            if not isinstance(schema, dict) or id(schema) in seen:
                continue
            self._spend(1)
            seen.add(id(schema))
            parts.append(schema)
            pending += schema.get("allOf", ())
            if "$ref" in schema:
                pending.append(self._target(schema))
            choices += [schema[name] for name in ("anyOf", "oneOf") if name in schema]
        return parts, choices

    def _need_of(self, parts: list[_Schema]) -> _Need | None:
        """Returns what each value that matches some schemas has to contain and is not known to be finite, or None."""
        self._spend(sum(1 + len(part.get("required", ())) for part in parts))
        if any("const" in part or "enum" in part for part in parts):
            return None
        types = set(TYPES).intersection(*(_types(part) for part in parts))
        if not types or not types <= {"object", "array"}:
            return None
        needs = []
        if "object" in types:
            needs.append(next(filter(self._is_unknown, _properties(parts)), None))
        if "array" in types:
            needs.append(next(filter(self._is_unknown, _items(parts)), None))
        return None if None in needs else needs[0]

    def _is_unknown(self, need: _Need) -> bool:
        self._spend(1)
        return need[1] is False or (isinstance(need[1], dict) and id(need[1]) not in self._finite)

    def _target(self, schema: _Schema) -> Any:
        """Returns the target of a schema's reference."""
        if (target := self._targets.get(schema["$ref"])) is None:
            target = self._targets[schema["$ref"]] = resolved(self._root, schema["$ref"])
        return target

    def _spend(self, work: int) -> None:
        """Raises UnsupportedSchemaError if the schema needs too much work."""
        self._work += work
        if self._work > _MAX_WORK:
            raise UnsupportedSchemaError(TOO_COSTLY)


def _types(schema: _Schema) -> set[str]:
    types = schema.get("type", TYPES)
    return {types} if isinstance(types, str) else set(types)


def _properties(parts: list[_Schema]) -> Iterator[_Need]:
    """Yields the properties that an object has to have."""
    names = dict.fromkeys(name for part in parts for name in part.get("required", ()))
    for part in parts:
        for name in names:
            if name in part.get("properties", {}):
                yield name, part["properties"][name]
            else:  # a pattern may match the name
                yield name, "patternProperties" in part or part.get("additionalProperties", True)
        is_short = part.get("minProperties", 0) > len(names) and "patternProperties" not in part
        if is_short and all(name in names for name in part.get("properties", {})):
            yield "additionalProperties", part.get("additionalProperties", True)


def _items(parts: list[_Schema]) -> Iterator[_Need]:
    """Yields the items that an array has to have."""
    num_items = max(part.get("minItems", 0) for part in parts)
    for part in parts:
        first = part.get("prefixItems") or (part["items"] if isinstance(part.get("items"), list) else [])
        for schema in first[:num_items]:
            yield "prefixItems", schema
        if num_items > len(first):
            rest = part.get("additionalItems" if isinstance(part.get("items"), list) else "items", True)
            yield "items", rest
