"""Conversations, and the tools that the model may call in them, with the names of the API."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mpt_grpc.constraint import Constraint
from mpt_grpc.limits import MAX_PARALLEL_CALLS


class ToolCall(NamedTuple):
    """A call of a tool by the model, or in a delta the new part of one."""

    id: str
    name: str
    """In a delta, the ID and the name are in the first part of a call, and empty in the others."""
    arguments: str
    """A JSON object, unless a limit cut it short."""
    index: int = 0  # type: ignore[assignment]  # hides tuple.index
    """The place of the call among those of its output."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: str
    """'system', 'user', 'assistant' or 'tool'."""
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls that the assistant made."""
    tool_call_id: str = ""
    """The call to which a tool replies with this message."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. Calling it is up to the caller of the server."""

    name: str
    description: str
    parameters: str
    """The JSON Schema of the arguments, as JSON text."""


class ToolChoice(enum.Enum):
    """Whether the model calls tools."""

    AUTO = enum.auto()
    NONE = enum.auto()
    REQUIRED = enum.auto()


@dataclass(frozen=True)
class ToolCalls:
    """Constrains the output to calls of tools or, unless they are required, to text."""

    tools: tuple[Tool, ...]
    is_required: bool
    max_calls: int
    content: Constraint | None
    """The constraint on an output without calls. If there is none, text may also precede the calls."""
    stop_strings: tuple[str, ...] = ()
    """What may follow the calls, besides the end: with many templates, it is by these that the model ends its turn."""


@dataclass(frozen=True)
class Conversation:
    """Messages that the model's chat template turns into a prompt, and the tools that the model may call."""

    messages: tuple[Message, ...]
    drop_oldest_turns: bool = False
    """Whether to drop the oldest turns if the conversation does not fit in the context; the system message is kept."""
    add_generation_prompt: bool = True
    """Whether the prompt ends with the beginning of the assistant's message."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template."""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice.AUTO
    allowed_tools: tuple[str, ...] = ()
    """The names of the tools that may be called; empty allows all."""
    parallel_tool_calls: bool = True
    """Whether an output may have several calls."""
    continue_final_message: bool = False
    """Whether the prompt ends within the last message, of the assistant, which the output continues."""

    @property
    def shown_tools(self) -> tuple[Tool, ...]:
        """The tools that the model knows of."""
        return () if self.tool_choice is ToolChoice.NONE else self.tools

    def tool_calls(self, content: Constraint | None) -> ToolCalls | None:
        """Returns the constraint on an output that may call tools, or None if it may not; `content` is that on text."""
        if not self.shown_tools:
            return None
        callable_ = tuple(tool for tool in self.tools if not self.allowed_tools or tool.name in self.allowed_tools)
        is_required = self.tool_choice is ToolChoice.REQUIRED
        return ToolCalls(callable_, is_required, MAX_PARALLEL_CALLS if self.parallel_tool_calls else 1, content)


OutputConstraint = Constraint | ToolCalls
