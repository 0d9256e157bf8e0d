"""JSON Schemas that llguidance lacks keywords for are rewritten without changing what conforms to them."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel, Field

from mpt_grpc.errors import InvalidRequestError
from mpt_grpc.request import JsonSchema
from mpt_grpc.text.grammar import make_grammar
from mpt_grpc.text.json_schema import MAX_EXACT, rewrite

BYTES = LLTokenizer("byte")
INT64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}


def conforms(schema: Any, value: Any) -> bool:
    """Whether the grammar of the schema accepts a value as JSON."""
    matcher = LLMatcher(BYTES, make_grammar(JsonSchema(json.dumps(schema))))
    assert not matcher.is_error(), matcher.get_error()
    tokens = BYTES.tokenize_str(json.dumps(value))
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    "keywords",
    [
        {"format": "uri-reference"},
        {"format": "password"},
        {"format": "my-own-format"},
        {"uniqueItems": False},
        {"dependentRequired": {}},
        {"dependentRequired": {"a": []}},
        {"dependentSchemas": {"a": True}},
        {"propertyNames": {}},
        {"unevaluatedProperties": True},
        {"unevaluatedItems": {}},
        {"minContains": 2},
        {"not": False},
        {"if": {"type": "string"}},
        {"then": {"type": "string"}},
        {"if": True, "then": {}},
    ],
)
def test_keywords_without_effect_are_dropped(keywords: dict[str, Any]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", **keywords}}, **keywords}
    assert rewrite(schema) == {"type": "object", "properties": {"a": {"type": "array"}}}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "array", "contains": {}, "minContains": 2, "maxItems": 3}, [1, 2], [1]),
        ({"type": "string", "if": True, "then": {"enum": ["a"]}}, "a", "b"),
        ({"type": "string", "if": False, "then": {"enum": ["a"]}, "else": {"enum": ["b"]}}, "b", "a"),
        (
            {"type": "object", "properties": {"a": {"type": "integer"}}, "unevaluatedProperties": False},
            {"a": 1},
            {"b": 1},
        ),
        ({"type": "object", "properties": {"a": {"not": {}}, "b": {}}}, {"b": 1}, {"a": 1}),
        (INT64, -MAX_EXACT, 2**63),
        (INT64, 0, 1.5),
        ({**INT64, "exclusiveMaximum": 2**64, "maximum": 10}, 10, 11),
        ({"type": "number", "minimum": -3.4028235e38, "maximum": 3.4028235e38}, 1.25, 1e39),
    ],
)
def test_other_keywords_are_expressed_exactly(schema: dict[str, Any], good: Any, bad: Any) -> None:
    assert conforms(schema, good)
    assert not conforms(schema, bad)


@pytest.mark.parametrize(
    ("schema", "error"),
    [
        ({"enum": [1, 1234567890123456789]}, "/enum/1: 1234567890123456789: integers beyond"),
        (
            {"properties": {"a/b": {"const": {"id": -(2**53)}}}},
            "/properties/a~1b/const/id: -9007199254740992: integers",
        ),
        ({"type": "integer", "minimum": 2**53}, "/minimum: 9007199254740992: integers beyond"),
        ({"not": {}}, "no output can satisfy it"),
    ],
)
def test_what_cannot_be_enforced_exactly_is_refused_with_its_place(schema: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_grammar(JsonSchema(json.dumps(schema)))
    assert f"decoding.json_schema: {error}" in str(caught.value)


@pytest.mark.parametrize(
    "malformed",
    [
        {"contains": True, "minContains": "2"},
        {"contains": True, "minItems": None},
        {"contains": {}, "maxItems": 3, "maxContains": []},
        {"if": True, "then": {"type": "string"}, "allOf": 1},
        {"type": "object", "required": 1},
        {"type": "object", "required": [{}]},
    ],
)
def test_keywords_of_the_wrong_type_are_refused_with_their_place(malformed: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"decoding\.json_schema: /properties/a/\w+: must be a"):
        make_grammar(JsonSchema(json.dumps({"type": "object", "properties": {"a": malformed}})))


def test_data_is_not_taken_for_schemas() -> None:
    schema = {
        "const": {"format": "password", "not": {}},
        "default": {"uniqueItems": False},
        "properties": {"format": {}},
    }
    assert rewrite(schema) == schema


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int
    kittens: list[Pet] = []


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    tricks: list[str]


class Pet(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")


def test_discriminated_unions_of_pydantic_are_enforced() -> None:
    schema = Pet.model_json_schema()
    assert conforms(schema, {"pet": {"kind": "cat", "lives": 9}})
    assert conforms(schema, {"pet": {"kind": "cat", "lives": 9, "kittens": [{"pet": {"kind": "dog", "tricks": []}}]}})
    assert not conforms(schema, {"pet": {"kind": "dog", "lives": 9}})
    assert not conforms(schema, {"pet": {"lives": 9}})
