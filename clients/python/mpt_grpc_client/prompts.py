"""The prompts a model can continue: text, token IDs, or a conversation."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Role(enum.Enum):
    """The author of a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role | str
    """A `Role`, or its value."""
    content: str


Prompt = str | Sequence[int] | Sequence[Message | Mapping[str, str]]
"""Text, token IDs, or the messages of a conversation, the last of which is the user's. A mapping has the keys `role`
and `content`."""
