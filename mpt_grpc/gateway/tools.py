"""Functions that a caller forces: the answer is held to the function's parameters and given as its call.

The model was not made to choose among tools, so nothing else is offered.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mpt_grpc.gateway.errors import BadRequestError
from mpt_grpc_client.constraints import closed_schema

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
        closed: dict[str, Any] = closed_schema(self.parameters)
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
