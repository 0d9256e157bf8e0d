"""Functions that a caller forces: the answer is held to the function's parameters and given as its call.

The model was not made to choose among tools, so nothing else is offered.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mpt_grpc.gateway.errors import BadRequestError

_REMEDY = "force one function with tool_choice, or ask for JSON with response_format"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Function(_Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool | None = None

    @property
    def form(self) -> dict[str, Any]:
        """The schema of its arguments: the parameters and no others, unless they say that others may be."""
        closed: dict[str, Any] = _closed(self.parameters)
        return closed


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class FunctionName(_Strict):
    name: str


class ToolName(_Strict):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | ToolName


def forced_function(tools: list[Tool] | None, choice: ToolChoice | None) -> Function | None:
    """The function that has to be called, if there is one. Raises BadRequestError where the model had to choose."""
    functions = {tool.function.name: tool.function for tool in tools or ()}
    if isinstance(choice, ToolName):
        if choice.function.name not in functions:
            raise BadRequestError(f"tool_choice: tools has no function {choice.function.name!r}", "tool_choice")
        return functions[choice.function.name]
    if choice == "none" or not functions:
        return None
    if choice == "required" and len(functions) == 1:
        return next(iter(functions.values()))
    raise BadRequestError(f"tools: the model does not choose among tools: {_REMEDY}", "tools")


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for name in ("properties", "$defs"):
        if isinstance(parts := schema.get(name), dict):
            closed[name] = {key: _closed(part) for key, part in parts.items()}
    for name in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(parts := schema.get(name), list):
            closed[name] = [_closed(part) for part in parts]
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    if "properties" in schema and "allOf" not in schema:
        closed.setdefault("additionalProperties", False)
    return closed
