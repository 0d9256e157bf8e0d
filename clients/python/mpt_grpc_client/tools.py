"""Tools that the model may call, given as Python functions, pydantic models or schemas, and its calls of them."""

from __future__ import annotations

import enum
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    """1 to 64 letters, digits, underscores or dashes."""
    description: str = ""
    """What the function does, for the model."""
    parameters: Mapping[str, Any] | str | None = None
    """The JSON Schema of the arguments, as a mapping or as JSON text. Arguments that a mapping does not list are
    excluded unless it sets `additionalProperties`. None: there are no arguments."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by the model."""

    id: str
    """Identifies the call in the message with its result."""
    name: str
    arguments: str
    """A JSON object. It is complete unless a limit or a stop string ended the output before."""

    @property
    def values(self) -> dict[str, Any]:
        """The arguments by their names. Raises ValueError if they are not complete."""
        values: dict[str, Any] = json.loads(self.arguments)
        return values


@dataclass(frozen=True)
class ToolCallDelta:
    """The new part of a call. The arguments of all parts with the same index are concatenated."""

    index: int
    """The place of the call among those of its output."""
    id: str
    """This and the name are in the first part of a call, and empty in the others."""
    name: str
    arguments: str


ToolLike = Tool | Mapping[str, Any] | Callable[..., Any]
"""A `Tool`; a function or a pydantic model, whose docstring is the description; or a mapping in OpenAI's format."""


def as_tool(tool: ToolLike) -> Tool:
    """Returns a tool. Raises TypeError for a function whose parameters have no schema, or for another type."""
    if isinstance(tool, Tool):
        return tool
    if isinstance(tool, Mapping):
        function = tool.get("function", tool)
        return Tool(function["name"], function.get("description") or "", function.get("parameters"))
    if isinstance(tool, type) and hasattr(tool, "model_json_schema"):
        return Tool(tool.__name__, inspect.getdoc(tool) or "", tool.model_json_schema())
    if inspect.isroutine(tool):
        return Tool(tool.__name__, inspect.getdoc(tool) or "", _parameters(tool))
    raise TypeError(f"{tool!r} is not a tool: use a function, a pydantic model, a Tool or a mapping in OpenAI's format")


def _parameters(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(f"the annotations of {function!r} cannot be resolved: {error}") from error
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        where = f"parameter {name!r} of {getattr(function, '__name__', function)}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) or name not in hints:
            raise TypeError(f"{where}: a tool's parameters have names and types")
        properties[name] = _schema(hints[name], where)
        if parameter.default is parameter.empty:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def _schema(kind: Any, where: str) -> dict[str, Any]:
    """Returns the JSON Schema of a type."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        descriptions = [note for note in parts[1:] if isinstance(note, str)]
        return _schema(parts[0], where) | ({"description": descriptions[0]} if descriptions else {})
    if kind in _TYPES:
        return {"type": _TYPES[kind]}
    if origin is Literal:
        return {"enum": list(parts)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(part, where) for part in parts]}
    if kind is list or origin in (list, Sequence):
        return {"type": "array", **({"items": _schema(parts[0], where)} if parts else {})}
    if kind is dict or (origin in (dict, Mapping) and parts[0] is str):
        return {"type": "object", **({"additionalProperties": _schema(parts[1], where)} if parts else {})}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    raise TypeError(f"{where}: {kind!r} has no schema here: use a pydantic model of the arguments, or a Tool")
