"""What a model can be asked to continue: text, token ids, or a conversation."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Role(enum.Enum):
    """Who speaks; the numbers are the API's."""

    SYSTEM = 1
    USER = 2
    ASSISTANT = 3


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or the messages of a conversation, of which the last is the user's."""
