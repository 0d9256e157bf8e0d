"""Tools and calls of them, in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mpt_grpc.gateway.errors import BadRequestError, shortened
from mpt_grpc.gateway.strict import Strict
from mpt_grpc.limits import MAX_COUNTS
from mpt_grpc_client import GenerateOptions, ToolCall
from mpt_grpc_client import Tool as ClientTool
from mpt_grpc_client.constraints import closed_schema

_MAX_ALLOWED = MAX_COUNTS["conversation.allowed_tools"]


class Function(Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Ignored: arguments always conform to the parameters."""

    @cached_property
    def tool(self) -> ClientTool:
        """The client library's tool."""
        parameters = json.dumps(closed_schema(self.parameters), ensure_ascii=False) if self.parameters else None
        return ClientTool(self.name, self.description or "", parameters)

    @model_validator(mode="after")
    def _serialize(self) -> Self:
        """Serializes the parameters where the body is parsed, since they may be long."""
        _ = self.tool
        return self


class Tool(Strict):
    type: Literal["function"]
    function: Function
    cache_control: Any = None
    """Sent for other providers."""


class FunctionName(Strict):
    name: str


class ToolName(Strict):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolName], Field(fail_fast=True)]

    @field_validator("tools", mode="before")
    @classmethod
    def _check_num_tools(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) > _MAX_ALLOWED:
            why = f"{len(value)} items; at most {_MAX_ALLOWED} are allowed"
            raise BadRequestError(f"tool_choice.allowed_tools.tools: {why}", "tool_choice")
        return value


class AllowedToolChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | ToolName | AllowedToolChoice


class CalledFunction(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: str
    arguments: str


class MessageToolCall(BaseModel):
    """A call in a message, as this or another server has sent it."""

    model_config = ConfigDict(extra="ignore")

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def call(self) -> ToolCall:
        return ToolCall(self.id, self.function.name, self.function.arguments)


def tool_options(functions: Sequence[Function], choice: ToolChoice | None, parallel: bool | None) -> GenerateOptions:
    """Returns the client library's options. Raises BadRequestError for a choice of tools that do not exist."""
    if not functions:
        if choice not in (None, "none", "auto"):
            raise BadRequestError("tool_choice: no tool to call; set tools", "tool_choice")
        return GenerateOptions()
    options = GenerateOptions(tools=[function.tool for function in functions], parallel_tool_calls=parallel)
    if isinstance(choice, str):
        options["tool_choice"] = choice
    elif isinstance(choice, ToolName):
        options["tool_choice"], options["allowed_tools"] = "required", [choice.function.name]
    elif isinstance(choice, AllowedToolChoice):
        options["tool_choice"] = choice.allowed_tools.mode
        options["allowed_tools"] = [tool.function.name for tool in choice.allowed_tools.tools]
    names = {function.name for function in functions}
    for name in options.get("allowed_tools") or ():
        if name not in names:
            raise BadRequestError(f"tool_choice: no function in tools is named {shortened(name)!r}", "tool_choice")
    return options
