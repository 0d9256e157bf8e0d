"""The translation of plain values into `google.protobuf.Struct`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value

_MAX_DEPTH = 32
"""Below the depth of nested messages that protobuf parses, which is 100; each level of a Struct takes three."""


def struct(values: Mapping[str, object], depth: int = 1) -> Struct:
    """Returns the values as a Struct. Raises TypeError or ValueError for a value that it cannot hold exactly."""
    if not isinstance(values, Mapping):
        raise TypeError(f"must be a mapping of names to values, not {type(values).__name__}")
    return Struct(fields={name: _value(value, depth) for name, value in values.items()})


def _value(value: object, depth: int) -> Value:
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
    match value:
        case None:
            return Value(null_value=NULL_VALUE)
        case bool():
            return Value(bool_value=value)
        case int() | float():
            if float(value) != value:
                raise ValueError(f"{value} cannot be sent exactly, as numbers are doubles: send it as a string")
            return Value(number_value=value)
        case str():
            return Value(string_value=value)
        case Mapping():
            return Value(struct_value=struct(value, depth + 1))
        case Sequence() if not isinstance(value, bytes | bytearray | memoryview):
            return Value(list_value=ListValue(values=[_value(item, depth + 1) for item in value]))
        case _:
            raise TypeError(
                f"a value must be JSON: text, a number, true, false, null, a list or a mapping, not {value!r}"
            )
