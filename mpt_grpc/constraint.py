"""Constraints on outputs, with the names of the API."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JsonSchema:
    """Constrains the output to JSON that conforms to a schema."""

    schema: str
    """The schema as JSON text."""
    max_whitespace: int | None = None
    """The most consecutive whitespace characters between the elements of the output; if None, one space may follow each
    comma and colon."""


@dataclass(frozen=True)
class JsonObject:
    """Constrains the output to a JSON object."""

    max_whitespace: int | None = None


@dataclass(frozen=True)
class Regex:
    """Constrains the whole output to match a regular expression."""

    pattern: str


@dataclass(frozen=True)
class Choice:
    """Constrains the output to one of the given strings."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class LarkGrammar:
    """Constrains the output to a grammar in llguidance's variant of Lark."""

    grammar: str


Constraint = JsonSchema | JsonObject | Regex | Choice | LarkGrammar
