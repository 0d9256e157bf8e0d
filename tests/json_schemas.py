"""Hypothesis strategies for JSON schemas, and a validator independent of the library that enforces them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=4)
scalars = st.none() | st.booleans() | st.integers(-99, 99) | names


def bounded(kind: str, low: str, high: str, smallest: int, largest: int) -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.tuples(st.integers(smallest, largest), st.integers(smallest, largest)).map(sorted)
    return bounds.map(lambda b: {"type": kind, low: b[0], high: b[1]})


def objects(values: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    fields = st.dictionaries(names, st.tuples(values, st.booleans()), max_size=4)
    return fields.map(
        lambda f: {
            "type": "object",
            "properties": {name: schema for name, (schema, _) in f.items()},
            "required": [name for name, (_, is_required) in f.items() if is_required],
            "additionalProperties": False,
        }
    )


def arrays(values: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(bounded("array", "minItems", "maxItems", 0, 4), values).map(lambda p: {**p[0], "items": p[1]})


leaves = st.one_of(
    st.sampled_from([{"type": kind} for kind in ("string", "integer", "number", "boolean", "null")]),
    bounded("string", "minLength", "maxLength", 0, 12),
    bounded("integer", "minimum", "maximum", -500, 500),
    st.lists(scalars, min_size=1, max_size=4).map(lambda options: {"enum": options}),
    scalars.map(lambda value: {"const": value}),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        objects(inner), arrays(inner), st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
    ),
    max_leaves=8,
)
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is valid under one of the generated schemas."""
    if "anyOf" in schema:
        return any(conforms(value, option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return any(type(value) is type(o) and value == o for o in schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if kind == "string":
        return bool(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)))
    if kind == "integer":
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if kind == "array":
        in_bounds = schema["minItems"] <= len(value) <= schema["maxItems"]
        return in_bounds and all(conforms(item, schema["items"]) for item in value)
    if kind == "object":
        fields = schema["properties"]
        return set(schema["required"]) <= value.keys() <= fields.keys() and all(
            conforms(item, fields[name]) for name, item in value.items()
        )
    return True
