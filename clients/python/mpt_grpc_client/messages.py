"""Messages of a conversation in the forms that programs have them: ours, OpenAI's, pydantic models and LangChain's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from mpt_grpc_client.prompts import Message, MessageLike, Role
from mpt_grpc_client.tools import ToolCall

_ROLES = {role.value: role for role in Role} | {"developer": Role.SYSTEM}
_LANGCHAIN_ROLES = _ROLES | {"human": Role.USER, "ai": Role.ASSISTANT, "AIMessageChunk": Role.ASSISTANT}
"""By the type of a message."""
_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name"}  # the name of an author has no place in a prompt


def is_message(part: Any) -> TypeGuard[MessageLike]:
    return isinstance(part, Message | Mapping) or hasattr(part, "model_dump")


def as_message(message: MessageLike) -> Message:
    """Returns a message, whose role is a `Role`. Raises TypeError or ValueError for anything else."""
    if isinstance(message, Message):
        return Message(_role(message.role), _text(message.content), _calls(message.tool_calls), message.tool_call_id)
    if not isinstance(message, Mapping) and not hasattr(message, "model_dump"):
        raise TypeError(f"a message is a Message, a mapping or a pydantic model, not {type(message).__name__}")
    given = message if isinstance(message, Mapping) else message.model_dump()
    fields = {name: value for name, value in given.items() if value is not None}
    role = _role(fields["role"]) if "role" in fields else _LANGCHAIN_ROLES.get(fields.get("type", ""))
    if role is None or (role is not Role.ASSISTANT and "content" not in fields):
        raise TypeError(f"a message has a 'role' and a 'content'; this one has {sorted(fields)}")
    # A model, and a reply as another client has dumped it, have further fields.
    if given is message and role is not Role.ASSISTANT and (unknown := fields.keys() - _KEYS):
        raise TypeError(f"a message has the keys 'role' and 'content', not {', '.join(sorted(unknown))}")
    calls, call_id = _calls(fields.get("tool_calls", ())), fields.get("tool_call_id", "")
    return Message(role, _text(fields.get("content", "")), calls, call_id)


def _role(role: Role | str) -> Role:
    if isinstance(role, Role):
        return role
    if role not in _ROLES:
        raise ValueError(f"{role!r} is not a role: use 'system', 'user', 'assistant' or 'tool'")
    return _ROLES[role]


def _text(content: Any) -> str:
    """Returns the text of a message's content: text, or a list of parts that are text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise TypeError(
            f"the content of a message must be text, or a list of parts of text, not {type(content).__name__}"
        )
    return "".join(map(_part, content))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    text = (part.get("text", part.get("refusal"))) if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise TypeError(f"the content of a message must be text; a part of type {kind!r} is not supported")
    return text


def _calls(calls: Iterable[Any]) -> list[ToolCall]:
    return [call if isinstance(call, ToolCall) else _call(call) for call in calls]


def _call(call: Any) -> ToolCall:
    """Returns a call of OpenAI's format, or of LangChain's, whose arguments are a mapping."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    arguments = function.get("arguments", function.get("args"))
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise TypeError(f"a call is a ToolCall, or a mapping with 'id' and 'function', not {call!r}")
    return ToolCall(call.get("id") or "", function["name"], arguments)
