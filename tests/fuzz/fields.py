"""The fields of messages and of bodies, found by reflection, and what a hostile caller would send in each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

Path = tuple[FieldDescriptor, ...]
"""A field, after the fields of which the messages contain it."""
LONG_TEXT = "é" * 500_000
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_WIRE_TYPES = {
    FieldDescriptor.TYPE_DOUBLE: _FIXED64,
    FieldDescriptor.TYPE_FLOAT: _FIXED32,
    FieldDescriptor.TYPE_STRING: _LENGTH_DELIMITED,
    FieldDescriptor.TYPE_BYTES: _LENGTH_DELIMITED,
    FieldDescriptor.TYPE_MESSAGE: _LENGTH_DELIMITED,
}
_ZEROS = {_VARINT: b"\0", _LENGTH_DELIMITED: b"\0", _FIXED32: bytes(4), _FIXED64: bytes(8)}
_FLOATS = (float("nan"), float("inf"), float("-inf"), 3e38, -3e38)
_EXTREMES: Mapping[int, Sequence[float]] = {
    FieldDescriptor.CPPTYPE_UINT32: ((1 << 32) - 1,),
    FieldDescriptor.CPPTYPE_UINT64: ((1 << 64) - 1,),
    FieldDescriptor.CPPTYPE_INT32: (-1 << 31, (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-1 << 63, (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-1, 99, (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_FLOAT: _FLOATS,
    FieldDescriptor.CPPTYPE_DOUBLE: _FLOATS,
}
_VALID: Mapping[str, Message] = {
    "Conversation": pb.Conversation(
        messages=[pb.Message(role=pb.ROLE_USER)],
        tools=[pb.Tool(name="f")],
        tool_choice=pb.TOOL_CHOICE_NONE,
        add_generation_prompt=False,
    ),
    "Message": pb.Message(role=pb.ROLE_ASSISTANT),
    "Tool": pb.Tool(name="g"),
    "ToolCall": pb.ToolCall(name="f", arguments="{}"),
}
"""A valid message of each type that must not be empty."""


class Attack(NamedTuple):
    name: str
    data: bytes
    is_legal: bool = False


def paths(message: Descriptor, parents: Path = ()) -> Iterator[Path]:
    """Yields every field of a message and of those in it; a message of a kind that contains itself is entered once."""
    for field in message.fields:
        yield (*parents, field)
        inner = field.message_type
        if inner is not None and inner.full_name not in [parent.message_type.full_name for parent in parents]:
            yield from paths(inner, (*parents, field))


def attacks(path: Path) -> Iterator[Attack]:
    """Yields messages with an absurd count of a field, an absurd size of it, and the most extreme numbers in it."""
    field = path[-1]
    wire_type = _WIRE_TYPES.get(field.type, _VARINT)
    once = _tag(field, wire_type) + _ZEROS[wire_type]
    yield Attack("many times", _within(path, once * 300_000))
    # Of a field that is no list, the last value counts.
    yield Attack("often", _within(path, once * (100_000 // len(once))), is_legal=True)
    if field.is_packed:
        yield Attack("many numbers", _within(path, _delimited(field, b"\5" * 1_500_000)))
    if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        yield Attack("long", _within(path, _delimited(field, LONG_TEXT.encode())))
    for number in _EXTREMES.get(field.cpp_type, ()):
        value = [number] if field.is_repeated else number
        message = GetMessageClass(field.containing_type)(**{field.name: value})
        yield Attack(str(number), _within(path, message.SerializeToString()))


def _within(path: Path, data: bytes) -> bytes:
    """Returns a message with these fields in the innermost message of a path, all of which are otherwise valid."""
    for parent in reversed(path[:-1]):
        valid = _VALID.get(parent.message_type.name)
        data = _delimited(parent, (b"" if valid is None else valid.SerializeToString()) + data)
    return data


def _delimited(field: FieldDescriptor, data: bytes) -> bytes:
    return _tag(field, _LENGTH_DELIMITED) + _varint(len(data)) + data


def _tag(field: FieldDescriptor, wire_type: int) -> bytes:
    return _varint(field.number << 3 | wire_type)


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80]) + _varint(number >> 7)


class BodyField(NamedTuple):
    endpoint: str
    path: str
    kinds: Sequence[Any]
    """The schemas of which its value has to conform to one."""
    body: Callable[[Any], Any]
    """Returns a body that is valid but for the value of the field."""

    @property
    def has_any_value(self) -> bool:
        return any(not {"type", "const", "enum"} & kind.keys() for kind in self.kinds)

    def attacks(self) -> Iterator[bytes]:
        """Yields bodies in which the value of the field is absurd for its size, count or depth, or as a number."""
        return (json.dumps(self.body(value), ensure_ascii=False).encode() for value in self._values())

    def _values(self) -> Iterator[Any]:
        types = {kind.get("type") for kind in self.kinds}
        yield reduce(lambda value, _: [value], range(100), 1)
        if types & {"integer", "number"}:
            yield from (10**400, 1 << 64, -1 << 63, 1e308)
        if "string" in types or self.has_any_value:
            yield LONG_TEXT
        if "array" in types or self.has_any_value:
            yield from ([5] * 270_000, [{}] * 20_000)
        if "object" in types or self.has_any_value:
            yield dict.fromkeys(map(str, range(20_000)), 1)


_VALID_BODIES: Mapping[str, Any] = {
    "ChatCompletionRequest": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "ChatMessage": {"role": "user", "content": "x"},
    "CompletionRequest": {"prompt": "x", "max_tokens": 1},
    "MessageItem": {"role": "user", "content": "x"},
    "ResponseFormat": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "ResponseRequest": {"input": "x", "max_output_tokens": 1},
    "TextFormat": {"type": "json_schema", "name": "x", "schema": {}},
}
"""Valid values of schemas that require more than they say, or whose responses are long."""


def body_fields(document: Any) -> Iterator[BodyField]:
    """Yields every field of the bodies of requests in an OpenAPI document, and those in it."""
    schemas = _Schemas(document["components"]["schemas"])
    for endpoint, operations in document["paths"].items():
        for operation in operations.values():
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                yield from schemas.fields(schema, BodyField(endpoint, "", (), lambda value: value))


class _Schemas:
    def __init__(self, schemas: Any) -> None:
        self._schemas = schemas

    def fields(self, schema: Any, parent: BodyField) -> Iterator[BodyField]:
        """Yields every field of a value that conforms to a schema, and those in it."""
        for kind in self._kinds(schema):
            values = kind.get("additionalProperties")
            parts = {**kind.get("properties", {}), 0: kind.get("items"), "5": values}
            for key, part in parts.items():
                if not isinstance(part, dict):
                    continue

                def within(value: Any, kind: Any = kind, key: Any = key) -> Any:
                    return parent.body([value] if key == 0 else {**self._example(kind), key: value})

                path = f"{parent.path}[0]" if key == 0 else f"{parent.path}.{key}".removeprefix(".")
                field = BodyField(parent.endpoint, path, list(self._kinds(part)), within)
                yield field
                yield from self.fields(part, field)

    def _example(self, schema: Any) -> Any:
        """Returns a short value that conforms to a schema."""
        kind = next(self._kinds(schema))
        if kind.get("title") in _VALID_BODIES:
            return _VALID_BODIES[kind["title"]]
        if "const" in kind or "enum" in kind:
            return kind.get("const") or kind["enum"][0]
        if kind.get("type") == "array":
            return [self._example(kind["items"])]
        required = {name: self._example(kind["properties"][name]) for name in kind.get("required", ())}
        return {"string": "a", "integer": 1, "object": required}.get(kind.get("type"))

    def _kinds(self, schema: Any) -> Iterator[Any]:
        """Yields the schemas of which a value has to conform to one."""
        if "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        if parts := schema.get("anyOf") or schema.get("oneOf"):
            for part in parts:
                yield from self._kinds(part)
        else:
            yield schema
