"""The messages of a chat completion, as callers write them and as clients send back those that they received."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mpt_grpc.gateway.errors import BadRequestError
from mpt_grpc.gateway.strict import Many, Strict, check_num_items, kind_of_content
from mpt_grpc.gateway.tools import MessageToolCall
from mpt_grpc.limits import MAX_BYTES
from mpt_grpc_client import Message, Role

_MAX_KWARGS_BYTES = MAX_BYTES["conversation.chat_template_kwargs"]
_ROLES = {"user": Role.USER, "assistant": Role.ASSISTANT, "tool": Role.TOOL}


class TextPart(Strict):
    type: Literal["text"]
    text: str
    # Sent for other providers.
    cache_control: Any = None
    prompt_cache_breakpoint: Any = None
    annotations: Any = None


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


ContentParts = Many[Annotated[TextPart | RefusalPart, Field(discriminator="type")]]
Content = Annotated[Annotated[str, Tag("text")] | Annotated[ContentParts, Tag("parts")], Discriminator(kind_of_content)]


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(default=None, validate_default=True)
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    # What SDKs and other servers add to the messages that they return, and lm-eval to those that it sends.
    type: Literal["text", "message"] | None = None
    refusal: str | None = None
    id: str | None = None
    annotations: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    cache_control: Any = None
    provider_specific_fields: Any = None
    parsed: Any = None
    audio: None = None
    function_call: None = None
    prefix: bool | None = None
    """Whether the output continues this message, if it is the last one and the assistant's."""

    @model_validator(mode="before")
    @classmethod
    def _ignore_what_servers_add(cls, value: Any) -> Any:
        """Leaves out unknown fields of an assistant's message, which another server may have sent."""
        if isinstance(value, dict) and value.get("role") == "assistant":
            return {name: field for name, field in value.items() if name in cls.model_fields}
        return value

    # Between two messages, this Python code also lets other threads run, which Pydantic's own does not.
    _check_num_items = field_validator("content", "tool_calls", mode="before")(check_num_items)

    @field_validator("content")
    @classmethod
    def _check_content(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role") != "assistant":
            raise PydanticCustomError("missing_content", "required")
        return value

    def message(self) -> Message:
        """Returns the client library's message."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        calls = [call.call() for call in self.tool_calls or ()]
        call_id = self.tool_call_id if self.role == "tool" else None
        return Message(_ROLES.get(self.role, Role.SYSTEM), text, calls, call_id or "")


def message_fields(messages: Sequence[ChatMessage], *, is_prefixed: bool = False) -> dict[str, str]:
    """Returns the names of messages and of what they contain, by their paths in the client library's prompt.

    is_prefixed: whether the last message itself asks to be continued, if anything does.
    """
    names = {"prompt": "messages", "prompt.tool_calls": "messages"}
    if is_prefixed and messages[-1].prefix:
        names["continue_final_message"] = f"messages[{len(messages) - 1}].prefix"
    for index, message in enumerate(messages):
        for number in range(len(message.tool_calls or ())):
            call = f"[{index}].tool_calls[{number}]"
            names[f"prompt{call}.name"] = f"messages{call}.function.name"
    return names


def check_template_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the chat template. Raises BadRequestError if they are too long to be sent."""
    size = len(json.dumps(values, ensure_ascii=False).encode())
    if size > _MAX_KWARGS_BYTES:
        why = f"{size} bytes; at most {_MAX_KWARGS_BYTES} are allowed"
        raise BadRequestError(f"chat_template_kwargs: {why}", "chat_template_kwargs")
    return values
