"""What an output may be: the values of the option `constraint`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class JsonSchema:
    """The output is JSON that a schema allows; the schema is a mapping, or JSON."""

    def __init__(self, schema: Mapping[str, Any] | str) -> None:
        """Raises TypeError or ValueError for a mapping that cannot be written as JSON."""
        self.schema = schema if isinstance(schema, str) else json.dumps(dict(schema))

    def __repr__(self) -> str:
        return f"JsonSchema({self.schema!r})"


@dataclass(frozen=True)
class JsonObject:
    """The output is any JSON object."""


@dataclass(frozen=True)
class Regex:
    """The whole output matches a regular expression, in the syntax of Rust's regex crate."""

    pattern: str


class Choice:
    """The output is one of these strings."""

    def __init__(self, *options: str) -> None:
        self.options = options

    def __repr__(self) -> str:
        return f"Choice{self.options!r}"


@dataclass(frozen=True)
class LarkGrammar:
    """The output is a sentence of a grammar, in llguidance's variant of Lark."""

    grammar: str


Constraint = JsonSchema | JsonObject | Regex | Choice | LarkGrammar


def closed_schema(schema: Any) -> Any:
    """The schema with no properties but those that its objects name, where it does not say whether others may be.

    A class has no fields but its own and a function no parameters, but their schemas allow more, and a weak model adds
    them for ever. Where `allOf` composes an object, nothing is closed.
    """
    if isinstance(schema, list):
        return [closed_schema(part) for part in schema]
    if not isinstance(schema, dict) or "allOf" in schema:
        return schema
    # The type tells an object's schema from a mapping of fields of which one is called "properties".
    closing = {"additionalProperties": False} if schema.get("type") == "object" and "properties" in schema else {}
    return closing | {name: closed_schema(part) for name, part in schema.items()}
