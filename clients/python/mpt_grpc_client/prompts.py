"""The prompts a model can continue: text, token IDs, or a conversation."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


Prompt = str | Sequence[int] | Sequence[Message | Mapping[str, Any]]
"""Text, token IDs, or the messages of a conversation, the last of which is the user's or a tool's. A mapping has the
keys `role` and `content`, and may have `tool_calls` and `tool_call_id`."""
