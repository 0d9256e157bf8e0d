"""The prompts a model can continue: text, token IDs, or a conversation."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mpt_grpc_client.tools import ToolCall


class Role(enum.Enum):
    """The author of a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role | str
    """A `Role`, or its value."""
    content: str
    tool_calls: Sequence[ToolCall] = ()
    """The calls that the assistant made with this message."""
    tool_call_id: str = ""
    """The ID of the call whose result a tool's message is."""


class DumpableMessage(Protocol):
    """A message as a pydantic model, such as OpenAI's, or as an object of LangChain."""

    def model_dump(self) -> dict[str, Any]: ...


MessageLike = Message | Mapping[str, Any] | DumpableMessage
"""A message of a conversation; a mapping has OpenAI's format, whose content is text or a list of parts of text."""
Prompt = str | Sequence[int] | Sequence[MessageLike]
"""Text, token IDs, or the messages of a conversation, the last of which is the user's or a tool's."""
