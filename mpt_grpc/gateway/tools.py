"""Tools and calls of them, in OpenAI's formats: that of chat completions, and that of responses without a level."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mpt_grpc.gateway.errors import BadRequestError, shortened
from mpt_grpc.gateway.strict import Many, Strict, check_num_items
from mpt_grpc.limits import MAX_COUNTS
from mpt_grpc_client import GenerateOptions, ToolCall
from mpt_grpc_client import Tool as ClientTool
from mpt_grpc_client.constraints import closed_schema


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


def check_num_allowed(value: Any) -> Any:
    return check_num_items(value, MAX_COUNTS["conversation.allowed_tools"])


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Many[ToolName]

    _check_num_tools = field_validator("tools", mode="before")(check_num_allowed)


class AllowedToolChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | ToolName | AllowedToolChoice


class _Tool(Strict):
    type: Literal["function"]


class FunctionTool(Function, _Tool):  # in this order, the type is checked first
    # All tools are shown to the model, which calls them directly, and whose results are awaited and not checked.
    async_: bool | None = Field(default=None, alias="async")
    defer_loading: bool | None = None
    allowed_callers: Any = None
    output_schema: Any = None


class NamedFunction(FunctionName):
    type: Literal["function"]

    @property
    def tool_name(self) -> ToolName:
        return ToolName(type="function", function=FunctionName(name=self.name))


class AllowedFunctions(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Many[NamedFunction]

    _check_num_tools = field_validator("tools", mode="before")(check_num_allowed)


FunctionChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions


def chosen(choice: FunctionChoice | None) -> ToolChoice | None:
    """Returns a choice of tools as chat completions have it."""
    if isinstance(choice, NamedFunction):
        return choice.tool_name
    if isinstance(choice, AllowedFunctions):
        allowed = AllowedTools(mode=choice.mode, tools=[tool.tool_name for tool in choice.tools])
        return AllowedToolChoice(type="allowed_tools", allowed_tools=allowed)
    return choice


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
