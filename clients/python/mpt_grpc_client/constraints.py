"""The values of the option `constraint`, which restricts the output to a formal language."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class JsonSchema:
    """Constrains the output to JSON that conforms to a JSON Schema, given as a mapping or as JSON text."""

    def __init__(self, schema: Mapping[str, Any] | str) -> None:
        """Raises TypeError or ValueError for a mapping that cannot be serialized as JSON."""
        self.schema = schema if isinstance(schema, str) else json.dumps(dict(schema))

    def __repr__(self) -> str:
        return f"JsonSchema({self.schema!r})"


@dataclass(frozen=True)
class JsonObject:
    """Constrains the output to a JSON object."""


@dataclass(frozen=True)
class Regex:
    """Constrains the whole output to match a regular expression, in the syntax of Rust's regex crate."""

    pattern: str


class Choice:
    """Constrains the output to one of the given strings."""

    def __init__(self, *options: str) -> None:
        self.options = options

    def __repr__(self) -> str:
        return f"Choice{self.options!r}"


@dataclass(frozen=True)
class LarkGrammar:
    """Constrains the output to a grammar in llguidance's variant of Lark, starting at the rule `start`."""

    grammar: str


Constraint = JsonSchema | JsonObject | Regex | Choice | LarkGrammar


def closed_schema(schema: Any) -> Any:
    """Returns the schema with `additionalProperties: false` added to every object that lists properties but does not
    set it.

    A class has no other fields and a function no other parameters, but the schemas generated from them allow more, and
    a weak model keeps adding them. Objects composed with `allOf` are left open.
    """
    if isinstance(schema, list):
        return [closed_schema(part) for part in schema]
    if not isinstance(schema, dict) or "allOf" in schema:
        return schema
    # The type distinguishes an object's schema from a mapping of fields, one of which is called "properties".
    closing = {"additionalProperties": False} if schema.get("type") == "object" and "properties" in schema else {}
    return closing | {name: closed_schema(part) for name, part in schema.items()}
