"""Strategies for messages, bodies and bytes: ordinary ones, and what a client that is wrong or hostile would send."""

from __future__ import annotations

import struct
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

_PIECES = (
    "Once upon a time",
    " ",
    "<|endoftext|>",
    "<|im_end|>\n",
    "{",
    '"',
    "\\",
    "\0",
    "é",
    "🦊",
    "\u202e",
    "a" * 300,
)
_IDENTITIES = ("request_id", "model", "resume_fingerprint")
"""Fields of which nearly every value is refused, so that little else would be tried."""
_LANGUAGES = (
    r"[a-c]+(x|y){1,3}",
    "a\\",
    "(" * 50,
    "start: /a+/ | start",
    "start: ",
    '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}',
    '{"$ref": "#"}',
    '{"type": "array", "items": {"$ref": "#"}}',
    '{"enum": [1, null, "a"]}',
    "[" * 100,
)
texts = st.one_of(
    st.lists(st.sampled_from(_PIECES), max_size=4).map("".join), st.sampled_from(_LANGUAGES), st.text(max_size=20)
)
_unsigned = {32: (1, 2, 3, 7, 64, 0, 4095, 4096, 1 << 31, (1 << 32) - 1), 64: (1, 5, 0, 1 << 32, (1 << 64) - 1)}
_signed = {bits: (*values[:-3], -1, -(1 << (bits - 1)), (1 << (bits - 1)) - 1) for bits, values in _unsigned.items()}
_floats = (1.0, 0.5, 0.9, 0.0, -0.0, 2.0, -1.0, 1e-30, 3e38, float("inf"), float("-inf"), float("nan"))
_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: texts,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=20),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_UINT32: st.sampled_from(_unsigned[32]),
    FieldDescriptor.TYPE_UINT64: st.sampled_from(_unsigned[64]),
    FieldDescriptor.TYPE_INT32: st.sampled_from(_signed[32]),
    FieldDescriptor.TYPE_INT64: st.sampled_from(_signed[64]),
    FieldDescriptor.TYPE_FLOAT: st.sampled_from(_floats),
    FieldDescriptor.TYPE_DOUBLE: st.sampled_from(_floats),
    FieldDescriptor.TYPE_ENUM: st.sampled_from((0, 1, 2, 3, 4, 99)),
}


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, max_fields: int = 3) -> Message:
    """Draws a message with some of its fields, and some of theirs."""
    message = GetMessageClass(descriptor)()
    fields = [field for field in descriptor.fields if field.name not in _IDENTITIES or draw(st.integers(0, 9)) == 0]
    for field in draw(st.lists(st.sampled_from(fields), max_size=max_fields, unique=True)) if fields else ():
        target, part = getattr(message, field.name), field.message_type
        if part is None and field.is_repeated:
            target.extend(draw(st.lists(_SCALARS[field.type], max_size=4)))
        elif part is None:
            setattr(message, field.name, draw(_SCALARS[field.type]))
        elif part.GetOptions().map_entry:
            for _ in range(draw(st.integers(0, 3))):
                key, value = part.fields
                target[draw(_SCALARS[key.type])] = draw(_SCALARS[value.type])
        elif field.is_repeated:
            target.extend(draw(st.lists(messages(part), max_size=3)))
        else:
            target.CopyFrom(draw(messages(part)))
    return message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 65) | st.sampled_from(_floats) | texts,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(texts, values, max_size=4),
    max_leaves=8,
)


def frames() -> st.SearchStrategy[bytes]:
    """Frames of HTTP/2, of which the length, the type or the stream may be wrong."""

    def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None) -> bytes:
        size = len(payload) if length is None else length
        return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

    lengths = st.none() | st.sampled_from((0, 1, 0xFFFFFF))
    return st.builds(frame, st.integers(0, 12), st.integers(0, 255), st.integers(0, 5), st.binary(max_size=64), lengths)
