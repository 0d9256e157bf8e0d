"""Rewrites JSON Schemas into equivalent ones that llguidance supports.

Keywords without effect are dropped, and some that llguidance lacks are expressed by others. Every text that the result
allows conforms to the original schema. Bounds beyond the integers that a double represents exactly are narrowed to
those, because llguidance computes with doubles; other such numbers are refused instead of becoming different ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

Schema = dict[str, Any] | bool

MAX_EXACT = (1 << 53) - 1
"""The largest integer up to which a double represents every integer."""
_FORMATS = frozenset("date date-time duration email hostname ipv4 ipv6 time unknown uri uuid".split())
"""The values of `format` that llguidance enforces."""
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""The keywords whose values map names to schemas."""
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_COMBINING = ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "patternProperties")


class UnsupportedSchemaError(ValueError):
    """A schema that cannot be enforced exactly; the text has the JSON Pointer of the place."""


def rewrite(schema: dict[str, Any]) -> Schema:
    """Returns an equivalent schema. Raises UnsupportedSchemaError."""
    rewriter = _Rewriter(schema)
    result: Schema = rewriter.schema(schema, "")
    for reference, name in rewriter.required:
        definition = _resolve(result, reference)
        definition["required"] = list(dict.fromkeys((*definition.get("required", ()), name)))
    return result


class _Rewriter:
    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self.required: list[tuple[str, str]] = []
        """References to definitions with a property that they have to require."""

    def schema(self, schema: Any, path: str) -> Any:
        """Returns the schema at a place rewritten, and anything else unchanged for llguidance to refuse."""
        if not isinstance(schema, dict):
            return schema
        _check_types(schema, path)
        _check_numbers(schema, path)
        result = {name: self._keyword(name, value, f"{path}/{_escaped(name)}") for name, value in schema.items()}
        for step in (_annotations, _bounds, self._discriminated_union, _conditions, _contains, _unevaluated):
            step(result)
        negated = result.get("not")
        if negated in ({}, True):
            return False
        if negated is False:
            del result["not"]
        return result

    def _keyword(self, name: str, value: Any, path: str) -> Any:
        if name in _MAPS and isinstance(value, dict):
            return {key: self.schema(part, f"{path}/{_escaped(key)}") for key, part in value.items()}
        if name in _LISTS and isinstance(value, list):
            return [self.schema(part, f"{path}/{index}") for index, part in enumerate(value)]
        if name == "items" and isinstance(value, list):
            return [self.schema(part, f"{path}/{index}") for index, part in enumerate(value)]
        return self.schema(value, path) if name in _SINGLE else value

    def _discriminated_union(self, schema: dict[str, Any]) -> None:
        """Turns OpenAPI's discriminated unions into `anyOf`: their branches differ in a property that is required."""
        discriminator, branches = schema.get("discriminator"), schema.get("oneOf")
        if not isinstance(discriminator, dict) or not isinstance(branches, list) or "anyOf" in schema:
            return
        name = discriminator.get("propertyName")
        references = [branch.get("$ref") if isinstance(branch, dict) else None for branch in branches]
        resolved = [
            branch if reference is None else _resolve(self._root, reference)
            for branch, reference in zip(branches, references, strict=True)
        ]
        values = [_constants(branch, name) for branch in resolved]
        if not all(values) or any(one & other for one, other in combinations(values, 2)):
            return
        del schema["discriminator"]
        schema["anyOf"] = schema.pop("oneOf")
        for branch, reference in zip(schema["anyOf"], references, strict=True):
            if not isinstance(reference, str):
                branch["required"] = list(dict.fromkeys((*branch.get("required", ()), name)))
            elif isinstance(name, str):
                self.required.append((reference, name))


def _resolve(root: Any, reference: Any) -> dict[str, Any]:
    """Returns the definition that a reference within the schema leads to, or an empty one."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return {}
    place = root
    for part in reference.removeprefix("#/").split("/"):
        place = place.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(place, dict) else None
    return place if isinstance(place, dict) else {}


def _annotations(schema: dict[str, Any]) -> None:
    """Drops keywords and values that allow everything."""
    inert: Mapping[str, Callable[[Any], bool]] = {
        "format": lambda value: isinstance(value, str) and value not in _FORMATS,
        "uniqueItems": lambda value: value is False,
        "dependentRequired": lambda value: isinstance(value, dict) and not any(value.values()),
        "dependentSchemas": lambda value: (
            isinstance(value, dict) and all(part in ({}, True) for part in value.values())
        ),
        "propertyNames": lambda value: value in ({}, True),
        "unevaluatedProperties": lambda value: value in ({}, True),
        "unevaluatedItems": lambda value: value in ({}, True),
    }
    for name, is_inert in inert.items():
        if name in schema and is_inert(schema[name]):
            del schema[name]


def _bounds(schema: dict[str, Any]) -> None:
    """Narrows bounds to exact integers, which only excludes values that no text needs."""
    for name, sign in (("maximum", 1), ("exclusiveMaximum", 1), ("minimum", -1), ("exclusiveMinimum", -1)):
        value = schema.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value * sign > MAX_EXACT:
            del schema[name]
            inclusive = name.removeprefix("exclusive").lower()
            if not isinstance(schema.get(inclusive), int | float) or schema[inclusive] * sign > MAX_EXACT:
                schema[inclusive] = MAX_EXACT * sign


def _conditions(schema: dict[str, Any]) -> None:
    """Resolves conditions that are constant."""
    if "if" not in schema:
        schema.pop("then", None)
        schema.pop("else", None)
    elif schema["if"] in ({}, True, False) or schema.keys().isdisjoint(("then", "else")):
        taken = schema.pop("else" if schema["if"] is False else "then", True)
        for name in ("if", "then", "else"):
            schema.pop(name, None)
        if taken not in ({}, True):
            schema["allOf"] = [*schema.get("allOf", ()), taken]


def _contains(schema: dict[str, Any]) -> None:
    """Expresses `contains` of anything as a number of items."""
    if "contains" not in schema:
        schema.pop("minContains", None)
        schema.pop("maxContains", None)
    elif schema["contains"] in ({}, True):
        del schema["contains"]
        schema["minItems"] = max(schema.get("minItems", 0), schema.pop("minContains", 1))
        if (maximum := schema.pop("maxContains", None)) is not None:
            schema["maxItems"] = min(schema.get("maxItems", maximum), maximum)


def _unevaluated(schema: dict[str, Any]) -> None:
    """Without keywords that combine schemas, properties are unevaluated if they are additional."""
    if "unevaluatedProperties" in schema and schema.keys().isdisjoint((*_COMBINING, "additionalProperties")):
        schema["additionalProperties"] = schema.pop("unevaluatedProperties")


def _constants(branch: Any, name: Any) -> frozenset[str]:
    """Returns the texts that a property of a branch may have; empty if it may have others."""
    properties = branch.get("properties") if isinstance(branch, dict) else None
    form = properties.get(name) if isinstance(properties, dict) and isinstance(name, str) else None
    if not isinstance(form, dict):
        return frozenset()
    values = [form["const"]] if "const" in form else form.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return frozenset()
    return frozenset(values)


def _check_types(schema: dict[str, Any], path: str) -> None:
    """Refuses values that the rewriting could not compute with."""
    for name in ("minItems", "maxItems", "minContains", "maxContains"):
        if not isinstance(schema.get(name, 0), int | float):
            raise UnsupportedSchemaError(f"{path}/{name}: must be a number")
    if not isinstance(schema.get("allOf", []), list):
        raise UnsupportedSchemaError(f"{path}/allOf: must be a list of schemas")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise UnsupportedSchemaError(f"{path}/required: must be a list of property names")


def _check_numbers(schema: dict[str, Any], path: str) -> None:
    """Refuses numbers that llguidance would turn into others."""
    for name in ("const", "enum", "multipleOf"):
        for pointer, number in _numbers(schema.get(name), f"{path}/{name}"):
            _check_exact(number, pointer)
    for name, sign in (("minimum", 1), ("exclusiveMinimum", 1), ("maximum", -1), ("exclusiveMaximum", -1)):
        for pointer, number in _numbers(schema.get(name), f"{path}/{name}"):
            if number * sign > 0:  # other bounds are narrowed
                _check_exact(number, pointer)


def _check_exact(number: float, pointer: str) -> None:
    if isinstance(number, int) and abs(number) > MAX_EXACT:
        why = f"integers beyond {MAX_EXACT} are not supported: use a string"
        raise UnsupportedSchemaError(f"{pointer}: {number}: {why}")
    if not math.isfinite(number):
        raise UnsupportedSchemaError(f"{pointer}: the number is beyond the range of a double: use a string")


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Yields the numbers in a JSON value with their JSON Pointers."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{path}/{index}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{path}/{_escaped(key)}")


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
