"""Shows tools, their calls and their results to the model, in one of two ways with the same syntax of calls.

A template that takes `tools` and writes calls between `<tool_call>` and `</tool_call>` gets them as transformers passes
them. Any other template gets plain messages in which they are text: the built-in format, described in docs/tools.md.

What users and tools write is data: where it contains one of the format's tags, the tag's `<` becomes `&lt;`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mpt_grpc.conversation import Conversation, Message, Tool, ToolChoice
from mpt_grpc.errors import FieldViolation, InvalidRequestError
from mpt_grpc.json_values import is_deeper_than, is_unicode, parse_json, parse_object
from mpt_grpc.limits import MAX_TOOL_NAME_CHARACTERS
from mpt_grpc.text.literals import applied, strings

CALL_START, CALL_END = "<tool_call>", "</tool_call>"
_NO_PARAMETERS = '{"type": "object", "properties": {}, "additionalProperties": false}'
_TAG = re.compile(r"<(?=/?(?:tool_call|tool_response|tools)>)")
_NAME = re.compile(rf"[a-zA-Z0-9_-]{{1,{MAX_TOOL_NAME_CHARACTERS}}}")
_WRONG_NAME = f"must have 1 to {MAX_TOOL_NAME_CHARACTERS} letters, digits, underscores or dashes"
_MAX_DEPTH = 64
_INTRODUCTION = """\
The assistant can call these tools:
{tools}

To call one, the assistant writes its name and its arguments as JSON between two tags, and nothing after that:
<tool_call>
{{"name": "NAME", "arguments": {{"PARAMETER": "VALUE"}}}}
</tool_call>
The user then sends the result. If no tool is needed, the assistant replies with text."""


def tool_violations(conversation: Conversation) -> Iterator[FieldViolation]:
    """Yields what is wrong with the tools of a conversation and with the calls in its messages."""
    names = [tool.name for tool in conversation.tools]
    for index, tool in enumerate(conversation.tools):
        field = f"conversation.tools[{index}]"
        if not _NAME.fullmatch(tool.name):
            yield FieldViolation(f"{field}.name", _WRONG_NAME)
        elif tool.name in names[:index]:
            yield FieldViolation(f"{field}.name", f"{tool.name!r} is the name of another tool, too: rename one")
        try:
            parameters(tool, f"{field}.parameters")
        except InvalidRequestError as error:
            yield from error.violations
    for index, name in enumerate(conversation.allowed_tools):
        if name not in names:
            why = f"{name[:MAX_TOOL_NAME_CHARACTERS]!r} is not the name of a tool in tools"
            yield FieldViolation(f"conversation.allowed_tools[{index}]", why)
    if conversation.tool_choice is ToolChoice.REQUIRED and not names:
        yield FieldViolation("conversation.tool_choice", "no tool to call: set tools")
    if conversation.tools and "tools" in conversation.chat_template_kwargs:
        yield FieldViolation("conversation.chat_template_kwargs[tools]", "set by the field of this name: leave it out")
    for index, message in enumerate(conversation.messages):
        field = f"conversation.messages[{index}]"
        if message.tool_calls and message.role != "assistant":
            yield FieldViolation(f"{field}.tool_calls", "only messages with the role 'assistant' have calls")
        if message.tool_call_id and message.role != "tool":
            yield FieldViolation(f"{field}.tool_call_id", "only messages with the role 'tool' reply to a call")
        for number, call in enumerate(message.tool_calls):
            if not _NAME.fullmatch(call.name):
                yield FieldViolation(f"{field}.tool_calls[{number}].name", _WRONG_NAME)


def parameters(tool: Tool, field: str) -> dict[str, Any]:
    """Returns the schema of a tool's arguments. Raises InvalidRequestError, which names the field."""
    try:
        schema = parse_object(tool.parameters or _NO_PARAMETERS, _MAX_DEPTH)
    except ValueError as error:
        raise InvalidRequestError(FieldViolation(field, str(error))) from error
    if schema.get("type", "object") != "object":
        raise InvalidRequestError(FieldViolation(field, "must be a JSON Schema of the type 'object'"))
    return schema


def function(tool: Tool) -> dict[str, Any]:
    """Returns a tool as templates expect it."""
    schema = parameters(tool, "conversation.tools")
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": schema},
    }


def tool_texts(tool: Tool) -> Iterator[str]:
    """Yields the strings of a tool."""
    yield tool.name
    yield tool.description
    yield from strings(parameters(tool, "conversation.tools"))


def without_tags(messages: Sequence[Message], values_of: Callable[[str], Any]) -> list[Message]:
    """Returns messages in which what users and tools wrote, and the arguments of calls, contain no tag.

    values_of: `argument_values`, or what does the same.
    """
    result = []
    for message in messages:
        if message.role in ("user", "tool"):
            result.append(replace(message, content=_TAG.sub("&lt;", message.content)))
        else:
            calls = tuple(call._replace(arguments=_arguments(values_of(call.arguments))) for call in message.tool_calls)
            result.append(replace(message, tool_calls=calls))
    return result


def as_plain_messages(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Returns messages of system, user and assistant, in which tools, calls and results are text."""
    result: list[Message] = []
    if tools:
        shown = "\n".join(json.dumps(function(tool)["function"], ensure_ascii=False) for tool in tools)
        result.append(Message("system", _INTRODUCTION.format(tools=shown)))
        if messages[0].role == "system":
            result[0] = Message("system", f"{messages[0].content}\n\n{result[0].content}")
            messages = messages[1:]
    merged: list[Message] = []
    """A result, and the results and messages of the user that follow it: templates may require that roles alternate."""
    for message in messages:
        if message.role == "tool" or (merged and message.role == "user"):
            merged.append(_plain(message))
            continue
        result += _merged(merged)
        merged = []
        result.append(_plain(message))
    return [*result, *_merged(merged)]


def _merged(messages: Sequence[Message]) -> list[Message]:
    return [Message("user", "\n".join(message.content for message in messages))] if messages else []


def _plain(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    calls = [
        f'{CALL_START}\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n{CALL_END}'
        for call in message.tool_calls
    ]
    return Message(message.role, "\n".join(filter(None, [message.content, *calls])))


def argument_values(arguments: str) -> Any:
    """Returns the arguments of a call, or their text if they are not valid JSON, as in a call that was cut short."""
    try:
        values = parse_json(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return arguments if is_deeper_than(values, _MAX_DEPTH) or not is_unicode(values) else values


def _arguments(values: Any) -> str:
    """Returns arguments as JSON without tags, written as the model writes them."""
    return json.dumps(applied(lambda text: _TAG.sub("&lt;", text), values, to_names=True), ensure_ascii=False)
