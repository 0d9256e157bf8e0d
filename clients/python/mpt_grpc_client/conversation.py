"""The translation of messages and tools into the API's `Conversation`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpt_grpc_client.constraints import closed_schema
from mpt_grpc_client.messages import as_message
from mpt_grpc_client.prompts import MessageLike, Role
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.tools import ToolLike, as_tool

if TYPE_CHECKING:
    from mpt_grpc_client.options import GenerateOptions

_CHOICES = ("auto", "none", "required")


def conversation(messages: Sequence[MessageLike], options: GenerateOptions) -> pb.Conversation:
    """Returns the conversation with its options. Raises TypeError or ValueError for what is not valid."""
    kwargs, choice = options.get("chat_template_kwargs"), options.get("tool_choice")
    allowed_tools = options.get("allowed_tools") or ()
    if choice not in (None, *_CHOICES):
        raise ValueError(f"{choice!r} is not a choice: use {', '.join(_CHOICES)}; name the tools in allowed_tools")
    if isinstance(allowed_tools, str):
        raise TypeError("must be a list of names")
    return pb.Conversation(
        messages=map(_message, messages),
        drop_oldest_turns=options.get("drop_oldest_turns"),
        add_generation_prompt=options.get("add_generation_prompt"),
        chat_template_kwargs=None if kwargs is None else _json_object(kwargs),
        tools=map(_tool, options.get("tools") or ()),
        tool_choice=pb.ToolChoice.Value(f"TOOL_CHOICE_{(choice or 'unspecified').upper()}"),
        allowed_tools=allowed_tools,
        parallel_tool_calls=options.get("parallel_tool_calls"),
        continue_final_message=options.get("continue_final_message"),
    )


def _tool(tool: ToolLike) -> pb.Tool:
    tool = as_tool(tool)
    parameters = tool.parameters or ""
    if not isinstance(parameters, str):
        parameters = _json_object(closed_schema(parameters))
    return pb.Tool(name=tool.name, description=tool.description, parameters=parameters)


def _message(given: MessageLike) -> pb.Message:
    message = as_message(given)
    return pb.Message(
        role=pb.Role.Value(f"ROLE_{Role(message.role).name}"),
        content=message.content,
        tool_calls=[pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls],
        tool_call_id=message.tool_call_id,
    )


def _json_object(values: Mapping[str, Any]) -> str:
    """Returns a mapping as JSON. Raises TypeError or ValueError for what JSON cannot express."""
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise TypeError("must be a mapping of names to values")
    try:
        return json.dumps(dict(values), ensure_ascii=False, allow_nan=False, default=_plain)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _plain(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a value must be JSON: text, a number, true, false, null, a list or a mapping, not {value!r}")
