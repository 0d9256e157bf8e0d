"""The translation between LangChain's values and the client's: messages, results and output schemas."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, cast

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    merge_message_runs,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, GenerationChunk, LLMResult
from langchain_core.outputs import Generation as TextGeneration
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from mpt_grpc_client.constraints import closed_schema
from mpt_grpc_client.prompts import Message, Role
from mpt_grpc_client.responses import PartialGeneration
from mpt_grpc_client.results import Delta, Generation, Output, TokenLogprob, TopLogprob, Usage
from mpt_grpc_client.tools import ToolCall

_ROLES = (
    (SystemMessage, Role.SYSTEM),
    (HumanMessage, Role.USER),
    (AIMessage, Role.ASSISTANT),
    (ToolMessage, Role.TOOL),
)


def conversation(messages: Sequence[BaseMessage]) -> list[Message]:
    """Returns the client's messages. Consecutive messages of one role are merged, since chat templates expect
    alternation.

    Raises ValueError for content other than text and for roles other than system, user, assistant and tool.
    """
    return [
        Message(_role(message), _text(message), _calls(message), getattr(message, "tool_call_id", ""))
        for message in merge_message_runs(messages)
    ]


def tool_options(tools: Sequence[Any], tool_choice: Any) -> dict[str, Any]:
    """Returns the client's options for tools as LangChain describes them. Raises ValueError for an unknown choice."""
    options: dict[str, Any] = {"tools": [convert_to_openai_tool(tool) for tool in tools]}
    names = [tool["function"]["name"] for tool in options["tools"]]
    if isinstance(tool_choice, dict):
        tool_choice = tool_choice.get("function", {}).get("name")
    if tool_choice in (None, False):
        return options
    if tool_choice in ("auto", "none"):
        return options | {"tool_choice": tool_choice}
    if tool_choice in (True, "any", "required"):
        return options | {"tool_choice": "required"}
    if tool_choice not in names:
        raise ValueError(f"tool_choice: {tool_choice!r} is none of the tools: {', '.join(names)}")
    return options | {"tool_choice": "required", "allowed_tools": [tool_choice]}


def chat_result(generation: Generation, model_name: str) -> ChatResult:
    """Returns one generation for each output; the first carries the usage of all."""
    messages = [_message(output) for output in generation.outputs]
    messages[0].usage_metadata = _usage(generation.usage)
    return ChatResult(
        generations=[
            ChatGeneration(message=message, generation_info=_part(output) | _end(generation, output, model_name))
            for message, output in zip(messages, generation.outputs, strict=True)
        ]
    )


def llm_result(generations: Sequence[Generation], model_name: str) -> LLMResult:
    """Returns, for each prompt, one generation for each output; the first carries the usage of all."""
    return LLMResult(
        generations=[
            [
                TextGeneration(
                    text=output.text, generation_info=_part(output) | _llm_end(generation, output, model_name)
                )
                for output in generation.outputs
            ]
            for generation in generations
        ]
    )


def chat_chunk(delta: Delta, stream: PartialGeneration, model_name: str) -> ChatGenerationChunk | None:
    """Returns the chunk of a delta, if it is not empty. The last one carries the usage and the finish reason."""
    info, usage = _part(delta), None
    if delta.finish:
        generation = stream.result
        info, usage = info | _end(generation, generation.outputs[0], model_name), _usage(generation.usage)
    if not (delta.text or delta.tool_calls or info):
        return None
    calls = [
        tool_call_chunk(index=call.index, id=call.id or None, name=call.name or None, args=call.arguments)
        for call in delta.tool_calls
    ]
    position: Literal["last"] | None = "last" if delta.finish else None
    message = AIMessageChunk(content=delta.text, tool_call_chunks=calls, usage_metadata=usage, chunk_position=position)
    return ChatGenerationChunk(message=message, generation_info=info or None)


def llm_chunk(delta: Delta, stream: PartialGeneration, model_name: str) -> GenerationChunk | None:
    """Returns the chunk of a delta, if it is not empty. The last one carries the usage and the finish reason."""
    info = _part(delta)
    if delta.finish:
        info |= _llm_end(stream.result, stream.result.outputs[0], model_name)
    return GenerationChunk(text=delta.text, generation_info=info or None) if delta.text or info else None


def json_schema(schema: dict[str, Any] | type) -> dict[str, Any]:
    """Returns the given JSON Schema, or that of a pydantic class, a TypedDict or a function in OpenAI's format."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return cast(dict[str, Any], closed_schema(schema.model_json_schema()))
    if isinstance(schema, dict) and not schema.keys() & {"function", "parameters"}:
        return schema
    return cast(dict[str, Any], closed_schema(convert_to_json_schema(schema)))


def json_parser(schema: dict[str, Any] | type) -> JsonOutputParser:
    """Returns a parser that produces instances of a pydantic class, or else plain JSON values.

    It also parses the partial JSON of a stream.
    """
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return _WholePydanticParser(pydantic_object=schema)
    return _WholeJsonParser()


class _WholeJsonParser(JsonOutputParser):
    """A parser that refuses a completed output with truncated JSON, which LangChain's parser would repair silently."""

    def parse_result(self, result: list[TextGeneration], *, partial: bool = False) -> Any:
        [generation] = result
        assert isinstance(generation, ChatGeneration)
        reason = generation.message.response_metadata.get("finish_reason")
        if reason is None:
            return super().parse_result(result, partial=partial)
        try:
            json.loads(generation.text)
        except ValueError as error:
            message = f"the output ended before its JSON was complete: {reason}"
            raise OutputParserException(message, llm_output=generation.text) from error
        return super().parse_result(result)


class _WholePydanticParser(_WholeJsonParser, PydanticOutputParser[Any]):
    pass


def _role(message: BaseMessage) -> Role:
    for kind, role in _ROLES:
        if isinstance(message, kind):
            return role
    raise ValueError(f"messages of type {message.type!r} are not supported; use system, human, ai or tool messages")


def _calls(message: BaseMessage) -> list[ToolCall]:
    """Returns the calls of a message; those whose arguments are not valid JSON as they are."""
    if not isinstance(message, AIMessage):
        return []
    calls = [ToolCall(call["id"] or "", call["name"], json.dumps(call["args"])) for call in message.tool_calls]
    invalid = message.invalid_tool_calls
    return calls + [ToolCall(c["id"] or "", c["name"] or "", c["args"] or "") for c in invalid if c["name"]]


def _message(output: Output) -> AIMessage:
    calls, invalid = [], []
    for call in output.tool_calls:
        try:
            calls.append(tool_call(name=call.name, args=call.values, id=call.id))
        except ValueError as error:
            invalid.append(invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=str(error)))
    return AIMessage(output.text, tool_calls=calls, invalid_tool_calls=invalid)


def _text(message: BaseMessage) -> str:
    parts = [message.content] if isinstance(message.content, str) else message.content
    return "".join(map(_part_text, parts))


def _part_text(part: str | dict[str, Any]) -> str:
    if isinstance(part, str):
        return part
    if part.get("type") == "tool_use":  # the calls of a message, which are also its `tool_calls`
        return ""
    if part.get("type") != "text":
        raise ValueError(f"content of type {part.get('type')!r} is not supported; use text")
    text: str = part["text"]
    return text


def _part(part: Delta | Output) -> dict[str, Any]:
    """Returns the requested token IDs and log probabilities; LangChain concatenates the lists of a stream's chunks."""
    info: dict[str, Any] = {}
    if part.token_ids:
        info["token_ids"] = list(part.token_ids)
    if part.logprobs:
        info["logprobs"] = {"content": [_logprob(logprob) for logprob in part.logprobs]}
    return info


def _end(generation: Generation, output: Output, model_name: str) -> dict[str, Any]:
    return {
        "finish_reason": output.finish.reason.name.lower(),
        "model_name": model_name,
        "request_id": generation.request_id,
        "seed": output.seed,
    }


def _llm_end(generation: Generation, output: Output, model_name: str) -> dict[str, Any]:
    """Returns the end of a text generation with its usage, for which LangChain has no other place."""
    usage = {} if output.index else {"usage_metadata": _usage(generation.usage)}
    return _end(generation, output, model_name) | usage


def _usage(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.num_prompt_tokens,
        output_tokens=usage.num_output_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_output_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.num_cached_tokens),
    )


def _logprob(logprob: TokenLogprob) -> dict[str, Any]:
    """Returns a log probability in OpenAI's format, as LangChain's other chat models do."""
    return _token(logprob) | {"top_logprobs": [_token(top) for top in logprob.top_logprobs]}


def _token(token: TokenLogprob | TopLogprob) -> dict[str, Any]:
    text = token.token_bytes.decode(errors="replace")
    return {"token": text, "bytes": list(token.token_bytes), "token_id": token.token_id, "logprob": token.logprob}
