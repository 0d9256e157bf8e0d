"""Rewrites JSON Schemas into equivalent ones that llguidance supports.

Keywords without effect are dropped, and some that llguidance lacks are expressed by others. Every text that the result
allows conforms to the original schema. `schema_numbers.py` narrows or refuses numbers that llguidance would turn into
others, and `schema_patterns.py` narrows patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mpt_grpc.text.regex_syntax import unsupported_syntax
from mpt_grpc.text.schema_checks import EFFECTIVE, SIZES, UnsupportedSchemaError, check_types, error
from mpt_grpc.text.schema_formats import ENFORCED_FORMATS, express_format
from mpt_grpc.text.schema_numbers import bound_integers, check_numbers, narrow_bounds
from mpt_grpc.text.schema_patterns import narrow_patterns
from mpt_grpc.text.schema_places import (
    IDS,
    LISTS,
    MAPS,
    SINGLE,
    Inside,
    Place,
    escaped,
    is_resource,
    keys_of,
    pointer,
    reachable,
    resolved,
)
from mpt_grpc.text.schema_unions import Narrowing, narrowings

Schema = dict[str, Any] | bool

_DATA = ("const", "enum")
"""The keywords whose values are compared with, whatever they contain."""
_UNSUPPORTED = (
    "$dynamicRef", "contains", "if", "not", "propertyNames", "unevaluatedItems", "unevaluatedProperties", "uniqueItems",
)  # fmt: skip
_COMBINING = ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "contains", "patternProperties")


def rewrite(schema: dict[str, Any]) -> Schema:
    """Returns an equivalent schema. Raises UnsupportedSchemaError."""
    rewriter = _Rewriter(schema)
    result: Schema = rewriter.schema(schema, None)
    for target, place in rewriter.references:
        if isinstance(target, dict) and id(target) not in rewriter.rewritten:
            raise error(place, "what is there is not a schema: copy the definition to #/$defs/NAME")
    # llguidance would compare branches that have been narrowed.
    if rewriter.is_narrowed and rewriter.undecided:
        why = '"oneOf" is not supported where several options may match: use anyOf'
        raise error(Inside(rewriter.undecided[0], "oneOf"), why)
    for reference, name in rewriter.required:
        definition = resolved(result, reference)
        if isinstance(definition, dict):
            definition["required"] = list(dict.fromkeys((*definition.get("required", ()), name)))
    return result


class _Rewriter:
    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        schemas = list(reachable(root))
        self._reachable = set(map(id, schemas))
        references = (schema["$ref"] for schema in schemas if isinstance(schema.get("$ref"), str))
        self._kept = EFFECTIVE.union(*map(keys_of, references))
        """The keywords that are not dropped: those with an effect, and those inside of which references lead. Beside
        others, such as `discriminator`, llguidance may not support a reference that leads into itself."""
        # In older drafts, newer keywords have no effect.
        self._is_current = "draft-0" not in str(root.get("$schema"))
        self._id = "id" if "draft-04" in str(root.get("$schema")) else "$id"
        self.rewritten: set[int] = set()
        """The identities of the schemas that have been rewritten."""
        self.references: list[tuple[Any, Place]] = []
        """The targets of references, with the places of the references."""
        self.required: dict[tuple[str, str], None] = {}
        """References to definitions, each with a property that they have to require."""
        self.undecided: list[Place] = []
        """The schemas whose `oneOf` is left to llguidance."""
        self.is_narrowed = False

    def schema(self, schema: Any, place: Place) -> Any:
        """Returns the schema at a place rewritten."""
        if not isinstance(schema, dict | bool):
            raise error(place, "must be a schema: an object, true or false")
        if not isinstance(schema, dict):
            return self._value(schema, place)
        self.rewritten.add(id(schema))
        self._check_references(schema, place)
        check_types(schema, place)
        check_numbers(schema, place)
        result = {
            name: self._keyword(name, value, Inside(place, name))
            for name, value in schema.items()
            if name in self._kept
        }
        for step in _STEPS:
            step(result)
        self._one_of(result)
        if "oneOf" in result:
            self.undecided.append(place)
        negated = result.get("not")
        if negated in ({}, True):
            return False
        if negated is False:
            del result["not"]
        if (obstacle := self._obstacle(result)) is not None:
            raise UnsupportedSchemaError(f"{pointer(place)}/{obstacle}")
        return result

    def _check_references(self, schema: dict[str, Any], place: Place) -> None:
        if "$ref" in schema:
            target, where = resolved(self._root, schema["$ref"]), Inside(place, "$ref")
            if target is None:
                raise error(where, "nothing is there, and nothing is fetched: copy the definition to #/$defs/NAME")
            self.references.append((target, where))
        if place is not None and is_resource(schema, self._id):
            why = "is only supported for the whole schema: remove it, and refer to its place"
            raise error(Inside(place, self._id), why)

    def _obstacle(self, schema: dict[str, Any]) -> str | None:
        """Returns the first keyword that cannot be enforced, with the reason."""
        for name in _UNSUPPORTED if self._is_current else ():
            if name in schema:
                return f'{name}: "{name}" is not supported: remove it'
        patterns = schema.get("patternProperties")
        named = {f"patternProperties/{escaped(name)}": name for name in patterns} if isinstance(patterns, dict) else {}
        for name, pattern in {"pattern": schema.get("pattern"), **named}.items():
            if isinstance(pattern, str) and (reason := unsupported_syntax(pattern)) is not None:
                return f"{name}: {reason}"
        if schema.get("minProperties", 0) > len(schema.get("required", ())) + 1:
            why = (
                "more than one property beyond the required ones is not supported, because properties might be repeated"
            )
            return f"minProperties: {why}: require them by name"
        return None

    def _keyword(self, name: str, value: Any, place: Place) -> Any:
        if name in MAPS and isinstance(value, dict):
            return {
                key: part
                if name == "dependencies" and isinstance(part, list)
                else self.schema(part, Inside(place, key))
                for key, part in value.items()
            }
        if name in LISTS and isinstance(value, list):
            return [self.schema(part, Inside(place, index)) for index, part in enumerate(value)]
        if name in SINGLE:
            return self.schema(value, place)
        return value if name in _DATA else self._value(value, place)

    def _value(self, value: Any, place: Place) -> Any:
        """Returns a value that is not a schema, with the schemas rewritten in it to which references lead."""
        if id(value) in self._reachable:
            return self.schema(value, place)
        if isinstance(value, dict):
            return {key: self._value(part, Inside(place, key)) for key, part in value.items()}
        if isinstance(value, list):
            return [self._value(part, Inside(place, index)) for index, part in enumerate(value)]
        return value

    def _one_of(self, schema: dict[str, Any]) -> None:
        """Turns `oneOf` into `anyOf` where its branches exclude each other, or can be narrowed so that they do."""
        branches = schema.get("oneOf")
        if not isinstance(branches, list):
            return
        resolved = [self._resolved(branch) for branch in branches]
        if (narrowed := narrowings(resolved, schema.get("type"))) is None:
            return
        options = {"anyOf": [self._narrowed(*parts) for parts in zip(branches, resolved, narrowed, strict=True)]}
        del schema["oneOf"]
        if "anyOf" in schema:
            schema["allOf"] = [*schema.get("allOf", ()), options]
        else:
            schema.update(options)

    def _resolved(self, branch: Any) -> dict[str, Any]:
        """Returns the definition that a branch refers to, or else itself; an empty schema if that is unknown."""
        if not isinstance(branch, dict):
            return {}
        definition = resolved(self._root, branch["$ref"]) if "$ref" in branch else branch
        return definition if isinstance(definition, dict) else {}

    def _narrowed(self, branch: Any, resolved: dict[str, Any], narrowing: Narrowing) -> Any:
        if not narrowing.required and not narrowing.excluded:
            return branch
        self.is_narrowed = True
        result = dict(branch)
        if "type" not in resolved:
            result["type"] = "object"
        if narrowing.excluded:
            result["properties"] = {**branch.get("properties", {}), **dict.fromkeys(narrowing.excluded, False)}
        if "$ref" in branch:  # llguidance does not support other keywords beside recursive references
            self.required.update(dict.fromkeys((branch["$ref"], name) for name in narrowing.required))
        elif narrowing.required:
            result["required"] = list(dict.fromkeys((*branch.get("required", ()), *narrowing.required)))
        return result


def _annotations(schema: dict[str, Any]) -> None:
    """Drops keywords and values that allow everything."""
    inert: Mapping[str, Callable[[Any], bool]] = {
        "$schema": lambda value: "json-schema.org/draft" not in str(value),
        "additionalItems": lambda _: not isinstance(schema.get("items"), list),
        **dict.fromkeys(IDS, lambda value: isinstance(value, str)),
        "format": lambda value: isinstance(value, str) and value not in ENFORCED_FORMATS,
        "uniqueItems": lambda value: value is False or schema.get("maxItems") in (0, 1),
        "propertyNames": lambda value: value in ({}, True),
        "unevaluatedProperties": lambda value: value in ({}, True),
        "unevaluatedItems": lambda value: value in ({}, True),
    }
    for name, is_inert in inert.items():
        if name in schema and is_inert(schema[name]):
            del schema[name]
    patterns = schema.get("patternProperties")
    if isinstance(patterns, dict) and schema.keys().isdisjoint(("additionalProperties", "unevaluatedProperties")):
        schema["patternProperties"] = {name: part for name, part in patterns.items() if part not in ({}, True)}
    if schema.get("patternProperties") == {}:
        del schema["patternProperties"]


def _sizes(schema: dict[str, Any]) -> None:
    """Writes 2.0 as 2, which llguidance requires of sizes."""
    schema.update({name: int(schema[name]) for name in SIZES if name in schema})


def _property_names(schema: dict[str, Any]) -> None:
    """Expresses a pattern of property names, or a list of them, by properties."""
    names = schema.get("propertyNames")
    beside = ("properties", "patternProperties", "unevaluatedProperties")
    if not isinstance(names, dict) or not schema.keys().isdisjoint(beside):
        return
    rules = {name: rule for name, rule in names.items() if (name, rule) != ("type", "string")}
    options = [rules["const"]] if "const" in rules else rules.get("enum")
    value = schema.get("additionalProperties", True)
    if rules.keys() == {"pattern"} and isinstance(rules["pattern"], str):
        schema["patternProperties"] = {rules["pattern"]: value}
    elif len(rules) == 1 and isinstance(options, list):
        schema["properties"] = {name: value for name in options if isinstance(name, str)}
    else:
        return
    del schema["propertyNames"]
    schema["additionalProperties"] = False


def _dependencies(schema: dict[str, Any]) -> None:
    """Expresses that a property needs others, or a schema, as a choice: without that property or with what it needs."""
    choices = []
    for keyword in ("dependencies", "dependentRequired", "dependentSchemas"):
        for name, needs in schema.get(keyword, {}).items():
            if needs not in ([], {}, True):
                needs = {"required": needs} if isinstance(needs, list) else needs
                choices.append({"anyOf": [{"properties": {name: False}}, needs]})
        schema.pop(keyword, None)
    if choices:
        schema["allOf"] = [*schema.get("allOf", ()), *choices]


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
    """Without keywords that combine schemas, what is unevaluated is additional; beside such a keyword, nothing is."""
    for name, additional in (("unevaluatedProperties", "additionalProperties"), ("unevaluatedItems", "items")):
        if name in schema and additional in schema:
            del schema[name]
        elif name in schema and schema.keys().isdisjoint(_COMBINING):
            schema[additional] = schema.pop(name)


_STEPS = (
    _annotations, _sizes, narrow_bounds, bound_integers, _property_names, narrow_patterns, express_format,
    _dependencies, _conditions, _contains, _unevaluated,
)  # fmt: skip
