"""Forced functions: the output is constrained to the parameters of a function and returned as a call of it.

The model is not trained to choose among tools, so nothing else is supported.
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
    def arguments_schema(self) -> dict[str, Any]:
        """The schema of the arguments. Parameters that are not listed are excluded unless the schema allows them."""
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
    """Returns the function that must be called, if any. Raises BadRequestError if the model would have to choose."""
    functions = {tool.function.name: tool.function for tool in tools or ()}
    if isinstance(choice, ToolName):
        if choice.function.name not in functions:
            raise BadRequestError(f"tool_choice: no function in tools is named {choice.function.name!r}", "tool_choice")
        return functions[choice.function.name]
    if choice == "none" or not functions:
        return None
    if choice == "required" and len(functions) == 1:
        return next(iter(functions.values()))
    raise BadRequestError(f"tools: the model cannot choose among tools; {_REMEDY}", "tools")
