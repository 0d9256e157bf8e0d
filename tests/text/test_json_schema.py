"""JSON Schemas that llguidance lacks keywords for are rewritten without changing what conforms to them."""

from __future__ import annotations

import json
import re
import tracemalloc
from contextlib import suppress
from decimal import Decimal
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from processor_time import processor_seconds
from pydantic import BaseModel, Field

from mpt_grpc.constraint import JsonSchema, LarkGrammar
from mpt_grpc.errors import InvalidRequestError
from mpt_grpc.text.grammar import make_grammar
from mpt_grpc.text.json_schema import rewrite
from mpt_grpc.text.refusals import refusal_reason
from mpt_grpc.text.schema_checks import UnsupportedSchemaError
from mpt_grpc.text.schema_recursion import check_recursion
from mpt_grpc.text.schema_unions import MAX_EXACT

BYTES = LLTokenizer("byte")
INT64 = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}


def accepts(schema: Any, text: str) -> bool:
    """Whether the grammar of the schema accepts a text."""
    matcher = LLMatcher(BYTES, make_grammar(JsonSchema(json.dumps(schema))))
    assert not matcher.is_error(), matcher.get_error()
    tokens = BYTES.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def conforms(schema: Any, value: Any) -> bool:
    """Whether the grammar of the schema accepts a value as JSON."""
    return accepts(schema, json.dumps(value))


@pytest.mark.parametrize(
    "keywords",
    [
        {"format": "uri-reference"},
        {"format": "password"},
        {"format": "my-own-format"},
        {"uniqueItems": False},
        {"$schema": "https://example.com/a-schema-of-schemas"},
        {"additionalItems": False},
        {"dependencies": {"a": []}},
        {"patternProperties": {}},
        {"patternProperties": {"^.{1,255}$": {}}},
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
        ({"type": "object", "patternProperties": {"^.{1,9}$": {}}, "additionalProperties": False}, {"a": 1}, {"": 1}),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, {"ab": 1}, {"b": 1}),
        ({"type": "object", "propertyNames": {"enum": ["a", "b"]}, "minProperties": 1}, {"b": 1}, {"c": 1}),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, {"b": 1}, {"a": 1}),
        ({"type": "object", "dependencies": {"a": ["b"], "c": {"required": ["d"]}}}, {"d": 1}, {"c": 1}),
        ({"type": "object", "dependentSchemas": {"a": {"maxProperties": 1}}}, {"a": 1}, {"a": 1, "b": 1}),
        ({"type": "array", "prefixItems": [{"type": "null"}], "additionalItems": True}, [None, 1], [1]),
        ({"type": "array", "prefixItems": [{}], "unevaluatedItems": False}, [1], [1, 2]),
        ({"type": "array", "minItems": 2.0}, [1, 2], [1]),
        ({"type": ["string", "null"], "format": "date", "pattern": "^2"}, "2024-02-29", "2023-02-29"),
        ({"format": "date"}, None, "2100-02-29"),
        ({"type": "string", "format": "date"}, "0004-02-29", "0000-02-29"),
        ({"type": "string", "format": "date"}, "0001-01-01", "0000-01-01"),
        ({"type": "array", "uniqueItems": True, "maxItems": 1}, [1], [1, 1]),
        ({"type": "string", "format": "date-time"}, "2000-02-29T23:59:59.5Z", "2000-02-29T22:58:60Z"),
        ({"type": "string", "format": "time"}, "00:00:00+01:00", "24:00:00Z"),
        ({"type": "string", "format": "date-time"}, "2000-02-29T23:59:59Z", "2000-02-29t23:59:59z"),
        ({"type": "string", "format": "hostname"}, "a.b-c.example", "xn--a"),
        ({"type": "string", "format": "hostname"}, "a" * 63 + ".b", "a" * 64),
        ({"type": "string", "deprecated": True, "$comment": "c", "x-own": {"not": {}}, "required": []}, "a", 1),
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
    ("bounds", "good", "bad"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, [1e-9, 0.5], [0, -1e-9, 0.51]),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 1e-5}, [1e-6], [0, 1e-5]),
        ({"exclusiveMinimum": 1.0, "exclusiveMaximum": 1.9}, [1.000001, 1.5], [1, 1.9, 2]),
        ({"exclusiveMaximum": 0, "minimum": -0.5}, [-0.1], [0]),
        ({"exclusiveMaximum": -1, "minimum": -1.5}, [-1.001], [-1, -1.6]),
        ({"exclusiveMaximum": -0.0}, [-0.1, -5], [0, 0.1]),
        ({"allOf": [{"exclusiveMinimum": 3}, {"maximum": 3.5}]}, [3.1], [3, 3.6]),
        ({"maximum": 47.589999999999996}, [47.1, 46], [47.59]),
        ({"minimum": -3.7999999999999996e-07, "maximum": 0}, [-3.5e-07], [-3.8e-07]),
        ({"minimum": 1e-300, "maximum": 2}, [1e-9], [0]),
        ({"minimum": 2, "exclusiveMinimum": True, "maximum": 2.5}, [2.1], [2]),
        ({"minimum": 2, "exclusiveMinimum": False}, [2], [1]),
        ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 2}, [1], [0, 2]),
    ],
)
def test_bounds_of_numbers_are_enforced(bounds: dict[str, Any], good: list[float], bad: list[float]) -> None:
    schema = {"type": "number", **bounds}
    accepted = {value: accepts(schema, f"{Decimal(repr(value)):f}") for value in (*good, *bad)}
    assert accepted == dict.fromkeys(good, True) | dict.fromkeys(bad, False)


@pytest.mark.parametrize("kind", ["integer", ["integer", "null"]])
def test_integers_are_those_that_doubles_represent(kind: Any) -> None:
    assert conforms({"type": kind}, MAX_EXACT)
    assert conforms({"type": kind}, -MAX_EXACT)
    assert not conforms({"type": kind}, MAX_EXACT + 1)
    assert not conforms({"type": kind}, -MAX_EXACT - 1)
    assert not conforms({"type": kind, "minimum": 5}, MAX_EXACT + 1)
    assert not conforms({"type": kind, "exclusiveMaximum": 5}, -MAX_EXACT - 1)
    for other in ({"type": "number"}, {"type": ["integer", "number"]}, {"type": kind, "multipleOf": 7}):
        assert conforms(other, 7 * 10**17)


NUMBERS = st.integers(-9, 9) | st.decimals(-2, 2, places=3).map(float)


@settings(max_examples=60, derandomize=True)
@given(
    lower=st.sampled_from(["minimum", "exclusiveMinimum"]),
    upper=st.sampled_from(["maximum", "exclusiveMaximum"]),
    bounds=st.tuples(NUMBERS, NUMBERS).map(sorted).filter(lambda bounds: bounds[0] < bounds[1]),
)
def test_no_number_beyond_a_bound_is_allowed(lower: str, upper: str, bounds: list[float]) -> None:
    schema = {"type": "number", lower: bounds[0], upper: bounds[1]}
    low, high = (Decimal(repr(bound)) for bound in bounds)
    for bound in (low, high):
        for step in [Decimal(sign) / 10**place for sign in (-1, 0, 1) for place in range(5)]:
            value = bound + step
            is_above = value > low or (value == low and lower == "minimum")
            is_below = value < high or (value == high and upper == "maximum")
            assert (is_above and is_below) or not accepts(schema, f"{value:f}"), value


CHARACTERS = [chr(code) for code in (*range(0x80), 0x85, 0xA0, 0xB2, 0xE9, 0x660, 0x2028, 0x3000, 0x4E00, 0x1F600)]


@pytest.mark.parametrize(
    "pattern",
    [
        r'[^"]', r"[^\\]", r'[^"\\/]', r"[^'\"]", r"[^]a]", r"[]a]", r"[^-a]", r"[^ -~]", r"[\x00-\x1f]", r"[^a-z\"]",
        r"\w", r"\W", r"\d", r"\D", r"\s", r"\S", r"[^\w]", r"[^\d]", r"[^\s]", r"[^\w\s]", r"[\W_]", r"[^\W]",
        r"[^\S]", r"[\s\S]", r"[\w.-]", r"[a^]", r"[^\]]", r"\[", r"\\",
    ],
)  # fmt: skip
def test_a_pattern_allows_no_character_that_does_not_match(pattern: str) -> None:
    schemas = ({"pattern": f"^{pattern}$"}, {"propertyNames": {"pattern": f"^{pattern}$"}, "minProperties": 1})
    wrong = [
        character
        for character in CHARACTERS
        for schema, value in zip(schemas, (character, {character: 0}), strict=True)
        if not re.fullmatch(pattern, character)
        if any(accepts(schema, json.dumps(value, ensure_ascii=ascii_only)) for ascii_only in (True, False))
    ]
    assert wrong == []
    if pattern != r"[\x00-\x1f]":
        matching = [
            character for character in CHARACTERS if " " < character < "\x7f" and re.fullmatch(pattern, character)
        ]
        assert all(accepts(schemas[0], json.dumps(character)) for character in matching)


def test_classes_may_be_nested() -> None:
    for pattern in (r"^[a-f&&[^b]]$", r"^[[:alpha:]--b]$", r"^\P{L}|[acd]$", r"^[^\P{L}b]$"):
        accepted = {text: accepts({"pattern": pattern}, f'"{text}"') for text in "abc"}
        assert accepted == {"a": True, "b": False, "c": True}, pattern


DATE = {"type": "string", "format": "date"}
POINT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": False}
NODE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("branches", "good", "bad"),
    [
        ([{"type": "string"}, {"type": ["integer", "null"]}], ["a", 1, None], [1.5, {}]),
        ([{"enum": [1, 2]}, {"const": "a"}, {"const": True}], [1, "a", True], [3, False]),
        ([{"type": "string", "maxLength": 2}, {"enum": [1.0, 5]}], ["a", 5], ["abc", 2]),
        ([{"properties": {"k": {"const": k}}} for k in (1, "1", None)], [{"k": 1}, {"k": "1"}, {"k": None}], [{}, 5]),
        (
            [{"type": "object", "properties": {"v": {"type": t}}, "required": ["v"]} for t in ("string", "integer")],
            [{"v": "a"}, {"v": 1}],
            [{"v": None}, {}],
        ),
        ([{"required": ["a"]}, {"required": ["b"]}], [{"a": 1}, {"b": 1, "c": 2}], [{"a": 1, "b": 1}, {}, "text"]),
        ([{"$ref": "#/$defs/point"}, {"$ref": "#/$defs/node"}], [{"x": 1}, {"next": {"x": 1}}], [{"x": 1, "next": 1}]),
        ([POINT, {"type": "object", "required": ["y"]}], [{"x": 1}, {"y": 1}], [{"x": 1, "y": 1}]),
    ],
)
def test_one_of_is_enforced_if_its_branches_exclude_each_other(
    branches: list[Any], good: list[Any], bad: list[Any]
) -> None:
    schema = {"oneOf": branches, "$defs": {"point": POINT, "node": NODE}}
    assert [value for value in good if not conforms(schema, value)] == []
    assert [value for value in bad if conforms(schema, value)] == []


@pytest.mark.parametrize(
    "branches",
    [
        [{"type": "integer"}, {"type": "number"}],
        [{"const": 1}, {"const": 1.0}],
        [{"required": ["a"]}, {"required": ["a", "b"]}],
        [{"type": "object"}, {}],
        [{"type": ["object", "string"], "required": ["a"]}, {"required": ["b"]}],
    ],
)
def test_one_of_is_not_enforced_if_a_value_may_match_two_branches(branches: list[Any]) -> None:
    matcher = LLMatcher(BYTES, make_grammar(JsonSchema(json.dumps({"oneOf": branches}))), log_level=0)
    assert "oneOf" in matcher.get_error()


def test_narrowed_branches_do_not_make_an_outer_one_of_appear_exclusive() -> None:
    inner = {"type": "object", "oneOf": [{"required": ["a", "x"]}, {"required": ["p", "q"]}]}
    schema = {"oneOf": [inner, {"type": "object", "required": ["p", "a", "x"]}]}
    with pytest.raises(InvalidRequestError, match='/oneOf: "oneOf" is not supported where several options may match'):
        make_grammar(JsonSchema(json.dumps(schema)))


@pytest.mark.parametrize(
    ("pointer", "definitions"),
    [
        ("$defs/a/anyOf/1", {"$defs": {"a": {"anyOf": [{"type": "null"}, DATE]}}}),
        ("$defs/a/1", {"$defs": {"a": [{}, DATE]}}),
        ("components/schemas/a", {"components": {"schemas": {"a": DATE}}}),
        ("components/0/a", {"components": [{"a": DATE}]}),
    ],
)
def test_a_reference_may_lead_to_any_place(pointer: str, definitions: dict[str, Any]) -> None:
    schema = {"properties": {"on": {"$ref": f"#/{pointer}"}}, "required": ["on"], **definitions}
    assert conforms(schema, {"on": "2024-02-29"})
    assert not conforms(schema, {"on": "2023-02-29"})


@pytest.mark.parametrize("pointer", ["$defs/a/anyOf/0", "$defs/b/0", "components/schemas/c"])
def test_what_cannot_be_enforced_is_refused_wherever_a_reference_leads(pointer: str) -> None:
    part = {"type": "array", "uniqueItems": True}
    definitions = {"$defs": {"a": {"anyOf": [part]}, "b": [part]}, "components": {"schemas": {"c": part}}}
    schema = json.dumps({"$ref": f"#/{pointer}", **definitions})
    with pytest.raises(InvalidRequestError, match=rf"/{re.escape(pointer)}/uniqueItems: \"uniqueItems\" is not"):
        make_grammar(JsonSchema(schema))


INEXACT = {"enum": [2**53 + 1]}


@pytest.mark.parametrize(
    ("schema", "error"),
    [
        ({"$ref": "#/$defs", "$defs": INEXACT}, "/$defs/enum/0: 9007199254740993: integers beyond"),
        ({"anyOf": [{"enum": [[{"minItems": 2}]]}, {"$ref": "#/anyOf/0/enum/0/0"}]}, "/anyOf/1/$ref: what is there is"),
        ({"$ref": "#/const/a", "const": {"a": {"minProperties": 3}}}, "/$ref: what is there is not a schema"),
        ({"properties": {"a": {"$ref": "#/properties"}}}, "/properties/a/$ref: what is there is not a schema"),
        ({"$ref": "#/d/00", "d": [INEXACT]}, "/$ref: nothing is there, and nothing is fetched"),
        ({"$ref": "#a", "$defs": {"a": {"$anchor": "a", "minProperties": 3}}}, "/$ref: nothing is there"),
        ({"$ref": "a", "$defs": {"a": {"$id": "a", "minProperties": 3}}}, "/$ref: nothing is there"),
        ({"$id": "a", "$ref": "a#/d", "d": {"minProperties": 3}}, "/$ref: nothing is there"),
        ({"items": {"$id": "a", "$ref": "#/d", "d": {"minProperties": 3}}, "d": {}}, "/items/$id: is only supported"),
        ({"$ref": "#/d/b", "d": {"$id": "a", "b": {"$ref": "#/c"}, "c": INEXACT}, "c": {}}, "/$ref: nothing is there"),
        (
            {
                "$schema": "http://json-schema.org/draft-04/schema#",
                "items": {"id": "a", "allOf": [{"$ref": "#/d"}], "d": INEXACT},
                "d": {},
            },
            "/items/id: is only supported for the whole schema",
        ),
    ],
)
def test_references_that_lead_to_no_schema_are_refused(schema: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        make_grammar(JsonSchema(json.dumps(schema)))
    assert f"decoding.json_schema: {error}" in str(caught.value)


@pytest.mark.parametrize(
    ("reference", "name"),
    [("a~1b", "a/b"), ("a~01", "a~1"), ("a%25b", "a%b"), ("%C3%A4%20b", "ä b"), ("a+b", "a+b"), ("%2541", "%41")],
)
def test_escapes_in_references_are_resolved(reference: str, name: str) -> None:
    schema = {"$ref": f"#/%24defs/{reference}", "$defs": {name: DATE, "A": {}, "a": {}}}
    assert conforms(schema, "2024-02-29")
    assert not conforms(schema, "2023-02-29")


@pytest.mark.parametrize("name", ["definitions", "$defs", "enum", "const", "default", "$ref", "$id", "properties"])
@pytest.mark.parametrize("keyword", ["properties", "patternProperties", "dependentSchemas", "definitions"])
def test_keywords_may_be_names_of_properties_and_definitions(keyword: str, name: str) -> None:
    part = {"type": "object", "minProperties": 3}
    reference = {"items": {"$ref": f"#/definitions/{name}"}} if keyword == "definitions" else {}
    with pytest.raises(InvalidRequestError, match=rf": /{keyword}/{re.escape(name)}/minProperties: more than one"):
        make_grammar(JsonSchema(json.dumps({keyword: {name: part}, **reference})))


def test_ids_that_change_no_reference_are_ignored() -> None:
    schema = {
        "$id": "https://example.com/a#b",
        "properties": {"id": {"$id": "#/properties/id", "id": "id", "$ref": "#/$defs/a"}},
        "$defs": {"a": {"$id": "#a", "$ref": "#/$defs/b"}, "b": {"type": "null"}},
    }
    assert conforms(schema, {"id": None})
    assert not conforms(schema, {"id": 1})


def test_one_of_compares_branches_that_are_items_of_lists() -> None:
    schema = {"oneOf": [{"$ref": "#/$defs/a/anyOf/0"}, {"$ref": "#/$defs/a/anyOf/1"}]}
    definitions = {"$defs": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    assert conforms({**schema, **definitions}, None)
    assert not conforms({**schema, **definitions}, 1)


def test_unsupported_keywords_only_matter_where_they_are_used() -> None:
    definitions = {"$defs": {"set": {"type": "array", "uniqueItems": True}}}
    assert conforms({"type": "string", **definitions}, "a")
    with pytest.raises(InvalidRequestError, match=r"/\$defs/set/uniqueItems: \"uniqueItems\" is not supported"):
        make_grammar(JsonSchema(json.dumps({"properties": {"a": {"$ref": "#/$defs/set"}}, **definitions})))


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
        ({"properties": {"a": {"not": {"type": "null"}}}}, '/properties/a/not: "not" is not supported: remove it'),
        ({"items": {"pattern": r"\bword\b"}}, r'/items/pattern: word boundaries ("\b") are not supported'),
        ({"pattern": "[(?=](?!a)"}, '/pattern: look-around ("(?!") is not supported'),
        ({"patternProperties": {"(?<=a)": False}}, '/patternProperties/(?<=a): look-around ("(?<=") is not supported'),
        ({"pattern": "(?P<a>b)(?P=a)"}, "/pattern: backreferences are not supported"),
        ({"minProperties": 3, "required": ["a"]}, "/minProperties: more than one property beyond the required ones"),
        ({"maxLength": 0.5}, "/maxLength: must be a whole number"),
        ({"enum": [1e23]}, "/enum/0: 1e+23: integers beyond"),
        (
            {"const": 0.1234567890123456789},
            "/const: 0.12345678901234568: has too many digits to be exact: use at most 15",
        ),
        ({"const": 1e-202}, "/const: 1e-202: has too many digits to be exact"),
        (
            {"items": {"type": "STRING"}},
            '/items/type: "STRING" is not a type: use array, boolean, integer, null, number',
        ),
        (
            {"pattern": r"[\ud83c-\udbff]"},
            r'/pattern: halves of surrogate pairs ("\ud8…") are not supported: write the',
        ),
        ({"minItems": -1}, "/minItems: must be a whole number"),
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
        {"minimum": "1"},
        {"multipleOf": True},
        {"pattern": None},
        {"format": None},
        {"enum": None},
        {"items": None},
        {"additionalProperties": 1},
        {"anyOf": {}},
        {"patternProperties": []},
    ],
)
def test_keywords_of_the_wrong_type_are_refused_with_their_place(malformed: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"decoding\.json_schema: /properties/a/\w+: must be a"):
        make_grammar(JsonSchema(json.dumps({"type": "object", "properties": {"a": malformed}})))


def test_data_is_not_taken_for_schemas() -> None:
    schema = {
        "const": {"format": "password", "not": {}},
        "default": {"uniqueItems": False, "$ref": "#/$defs/set"},
        "examples": [{"$ref": "#/$defs/set"}],
        "enum": [{"$ref": "#/$defs/set"}],
        "$defs": {"set": {"uniqueItems": True}},
        "properties": {"format": {}},
    }
    assert rewrite(schema) == {name: schema[name] for name in ("const", "enum", "properties")}


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


LONG = "x" * 32_000
COSTLY: dict[str, Any] = {
    "constants": {"oneOf": [{"const": number} for number in range(4000)]},
    "properties": {"oneOf": [{"properties": {"kind": {"const": number}}} for number in range(1400)]},
    "items under a long name": {"properties": {LONG: {"enum": [1] * 15_000}}},
    "schemas under a long name": {"properties": {LONG: {"properties": {str(number): {} for number in range(3000)}}}},
}
"""Schemas, as large as they may be, for which a careless algorithm takes a minute or a gigabyte."""


@pytest.mark.parametrize("name", COSTLY)
def test_large_schemas_are_rewritten_in_little_time_and_memory(name: str) -> None:
    schema = json.loads(json.dumps(COSTLY[name]))
    assert processor_seconds(lambda: rewrite(schema)) < 1
    tracemalloc.start()
    rewrite(schema)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20


def test_many_constants_exclude_each_other_unless_one_occurs_twice() -> None:
    numbers = [{"const": number} for number in range(200)]
    assert rewrite({"oneOf": numbers}) == {"anyOf": numbers}
    assert "oneOf" in rewrite({"oneOf": [*numbers, {"const": 7.0}]})  # type: ignore[operator]


LIST = {"type": "object", "properties": {"next": {"$ref": "#/$defs/list"}}, "required": ["next"]}
NULL = {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({**LIST, "properties": {"next": {"$ref": "#"}}}, "next"),
        ({"$ref": "#/$defs/list", "$defs": {"list": LIST}}, "next"),
        ({"anyOf": [{"$ref": "#/$defs/list"}], "$defs": {"list": LIST}}, "next"),
        ({"allOf": [{"$ref": "#/$defs/list"}, {"type": "object"}], "$defs": {"list": LIST}}, "next"),
        ({"type": "object", "properties": LIST["properties"], "dependentRequired": {"a": ["next"]},
          "required": ["a"], "$defs": {"list": LIST}}, "next"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"],
          "$defs": {"a": {"$ref": "#/$defs/a"}}}, "a"),
        ({"type": "object", "properties": {"a": {"anyOf": [{"anyOf": [{"$ref": "#"}]}, False]}},
          "required": ["a"]}, "a"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "items"),
        ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, "prefixItems"),
        ({"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["a"]}, "a"),
        ({"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1}, "additionalProperties"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}, "required": ["a"],
          "$defs": {"b": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}}}, "a"),
    ],
)  # fmt: skip
def test_a_schema_of_only_infinite_values_is_refused(schema: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        make_grammar(JsonSchema(json.dumps(schema)))
    (violation,) = raised.value.violations
    assert violation.description.startswith(f'no output can satisfy it: "{name}" is required ')


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({**LIST, "properties": {"next": {"anyOf": [{"$ref": "#"}, NULL]}}}, {"next": {"next": None}}),
        ({**LIST, "required": [], "properties": {"next": {"$ref": "#"}}}, {"next": {}}),
        ({**LIST, "type": ["object", "null"], "properties": {"next": {"$ref": "#"}}}, {"next": None}),
        ({"type": "array", "items": {"$ref": "#"}}, [[]]),
        ({"type": "array", "prefixItems": [NULL, {"$ref": "#"}], "minItems": 1}, [None, [None]]),
        ({"oneOf": [{"$ref": "#/$defs/list"}, NULL], "$defs": {"list": LIST}}, None),
    ],
)  # fmt: skip
def test_a_recursive_schema_with_finite_values_is_enforced(schema: dict[str, Any], value: Any) -> None:
    assert conforms(schema, value)


@pytest.mark.parametrize(
    "beside",
    [{"discriminator": {"propertyName": "kind"}}, {"nullable": True}, {"deprecated": True}, {"x-order": 1}],
    ids=lambda beside: next(iter(beside)),
)
def test_keywords_without_effect_may_be_beside_a_reference_that_leads_into_itself(beside: dict[str, Any]) -> None:
    kinds = {kind: {"type": "object", "required": ["kind"], "properties": {"kind": {"const": kind}}} for kind in "ab"}
    kinds["a"]["properties"]["next"] = {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], **beside}
    schema = {"$ref": "#/$defs/a", "$defs": kinds}
    assert conforms(schema, {"kind": "a", "next": {"kind": "a", "next": {"kind": "b"}}})
    assert not conforms(schema, {"kind": "a", "next": {"kind": "c"}})


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (
            {"type": "object", "properties": {"next": {"$ref": "#", "type": "object"}}},
            '"#" leads into itself, and other keywords beside such a reference are not supported: remove them',
        ),
        (
            {"type": "object", "properties": {"a": NULL}, "minProperties": 1},
            'minProperties and maxProperties are only supported where all "properties" are required: require ',
        ),
    ],
)
def test_what_llguidance_lacks_is_refused_with_the_reason(schema: dict[str, Any], reason: str) -> None:
    matcher = LLMatcher(BYTES, make_grammar(JsonSchema(json.dumps(schema))), log_level=0)
    assert refusal_reason(matcher.get_error()).startswith(reason)


def test_references_lead_into_keywords_without_effect() -> None:
    schema = {
        "prefixItems": [{"$ref": "#/components/schemas/a~1b"}, {"$ref": "#/x-any/0"}],
        "components": {"schemas": {"a/b": {"type": "null"}}},
        "x-any": [True],
    }
    assert conforms(schema, [None, 1])
    assert not conforms(schema, [1])


def test_looking_for_infinite_values_takes_little_time() -> None:
    """Definitions in an order in which each is found after the next one."""
    order = [7 * number % 1000 for number in range(1000)]
    links = {
        str(i): {"type": "object", "required": ["a"], "properties": {"a": {"$ref": f"#/$defs/{i + 1}"}}} for i in order
    }
    schema = {"$ref": "#/$defs/0", "$defs": {**links, "1000": NULL}}
    seconds = processor_seconds(lambda: rewrite(schema) and check_recursion(schema))
    assert seconds < 1


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{}] * 2500, "anyOf": [{}] * 2500},
        {"$ref": "#/$defs/a", "prefixItems": [{"$ref": "#/$defs/a"}] * 500,
         "$defs": {"a": {"allOf": [{}] * 500, "oneOf": [{"minItems": 1}] * 500}}},
        {"allOf": [{"patternProperties": {"a": NULL}}] * 100, "anyOf": [{}] * 100,
         "required": [str(number) for number in range(1000)]},
        {"required": [str(number) for number in range(5000)], "$defs": {"a": {"$ref": "#"}},
         "anyOf": [{"$ref": "#/$defs/a"}] * 1000},
    ],
)  # fmt: skip
def test_looking_for_infinite_values_takes_little_time_in_large_combinations(schema: dict[str, Any]) -> None:
    schema = json.loads(json.dumps({"type": ["object", "array"], "properties": {"a": {"$ref": "#"}}, **schema}))

    def check() -> None:
        with suppress(UnsupportedSchemaError):
            check_recursion(schema)

    assert processor_seconds(check) < 1


def test_a_large_recursive_schema_of_many_kinds_of_nodes_is_enforced() -> None:
    children = {name: {"$ref": "#/$defs/node"} for name in "abcde"}
    nodes = {
        f"node{i}": {
            "type": "object",
            "properties": {"kind": {"const": f"node{i}"}, **children},
            "required": ["kind", *(children if i < 140 else ())],
        }
        for i in range(150)
    }
    node = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in nodes]}
    make_grammar(JsonSchema(json.dumps({"$ref": "#/$defs/node", "$defs": {"node": node, **nodes}})))


@pytest.mark.parametrize("part", ['\\"', "\\/"])
def test_strings_without_an_end_in_a_grammar_are_read_once(part: str) -> None:
    grammar = LarkGrammar('start: "a"\n' + part * 30_000)
    assert processor_seconds(lambda: make_grammar(grammar)) < 0.5


@pytest.mark.parametrize(
    "grammar",
    [
        """start: "x" %json {"type": "integer", "minimum": 0} "y" """,
        """start: "x" %json {"type": "object", "propertyNames": {"enum": ["a"]}} "y" """,
        """start: "x" object "y" // %json {
        object: %json { "dependentRequired": {"a": ["b"]}, "type": "object",
            "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "additionalProperties": false }""",
    ],
)
def test_a_schema_in_a_grammar_means_the_same_as_alone(grammar: str) -> None:
    schema = grammar[grammar.rindex("%json") + 5 :]
    schema = json.dumps(json.JSONDecoder().raw_decode(schema.lstrip())[0])
    for text in (
        "{}",
        '{"a": null}',
        '{"b": null}',
        '{"a": null, "b": null}',
        '{"a":\n1}',
        "9007199254740993",
        "7",
        "-1",
    ):
        alone = LLMatcher(BYTES, make_grammar(JsonSchema(schema)))
        inside = LLMatcher(BYTES, make_grammar(LarkGrammar(grammar)))
        tokens = BYTES.tokenize_str(text)
        is_valid = alone.try_consume_tokens(tokens) == len(tokens) and alone.is_accepting()
        tokens = BYTES.tokenize_str(f"x{text}y")
        assert (inside.try_consume_tokens(tokens) == len(tokens)) is is_valid, text


def test_what_looks_like_a_schema_in_a_string_or_comment_of_a_grammar_is_not_one() -> None:
    grammar = 'start: "%json {" /%json [{]/ // %json {\n'
    matcher = LLMatcher(BYTES, make_grammar(LarkGrammar(grammar)))
    assert matcher.try_consume_tokens(BYTES.tokenize_str("%json {%json {")) == 14
