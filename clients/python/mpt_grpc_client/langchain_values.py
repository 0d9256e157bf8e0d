"""The translation between LangChain's values and the client's: messages, results and the schemas of outputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    merge_message_runs,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, GenerationChunk, LLMResult
from langchain_core.outputs import Generation as TextGeneration
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from mpt_grpc_client.constraints import closed_schema
from mpt_grpc_client.prompts import Message, Role
from mpt_grpc_client.responses import PartialGeneration
from mpt_grpc_client.results import Delta, Generation, Output, TokenLogprob, TopLogprob, Usage


def conversation(messages: Sequence[BaseMessage]) -> list[Message]:
    """The client's messages; runs of one role become one, as chat templates want their roles to alternate.

    Raises ValueError for what is no text of the system, the user or the assistant.
    """
    return [Message(_role(message), _text(message)) for message in merge_message_runs(messages)]


def chat_result(generation: Generation, model_name: str) -> ChatResult:
    """One generation an output; the first has the usage of all."""
    messages = [AIMessage(output.text) for output in generation.outputs]
    messages[0].usage_metadata = _usage(generation.usage)
    return ChatResult(
        generations=[
            ChatGeneration(message=message, generation_info=_part(output) | _end(generation, output, model_name))
            for message, output in zip(messages, generation.outputs, strict=True)
        ]
    )


def llm_result(generations: Sequence[Generation], model_name: str) -> LLMResult:
    """For each prompt one generation an output, of which the first has the usage of all."""
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
    """What a delta says, if anything; the last says all but the text that came before."""
    _check_single(delta)
    info, usage = _part(delta), None
    if delta.finish:
        generation = stream.result
        info, usage = info | _end(generation, generation.outputs[0], model_name), _usage(generation.usage)
    if not (delta.text or info):
        return None
    message = AIMessageChunk(content=delta.text, usage_metadata=usage, chunk_position="last" if delta.finish else None)
    return ChatGenerationChunk(message=message, generation_info=info or None)


def llm_chunk(delta: Delta, stream: PartialGeneration, model_name: str) -> GenerationChunk | None:
    """As `chat_chunk`."""
    _check_single(delta)
    info = _part(delta)
    if delta.finish:
        info |= _llm_end(stream.result, stream.result.outputs[0], model_name)
    return GenerationChunk(text=delta.text, generation_info=info or None) if delta.text or info else None


def json_schema(schema: dict[str, Any] | type) -> dict[str, Any]:
    """The JSON schema that is given, or that of a pydantic class, a TypedDict or a function in OpenAI's form."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return cast(dict[str, Any], closed_schema(schema.model_json_schema()))
    if isinstance(schema, dict) and not schema.keys() & {"function", "parameters"}:
        return schema
    return cast(dict[str, Any], closed_schema(convert_to_json_schema(schema)))


def json_parser(schema: dict[str, Any] | type) -> JsonOutputParser:
    """Makes instances of a pydantic class, else what the JSON says; of a stream, as far as it has come."""
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return _WholePydanticParser(pydantic_object=schema)
    return _WholeJsonParser()


class _WholeJsonParser(JsonOutputParser):
    """LangChain's parser closes what is open in JSON that was cut short; this one refuses it once no more will come."""

    def parse_result(self, result: list[TextGeneration], *, partial: bool = False) -> Any:
        [generation] = result
        assert isinstance(generation, ChatGeneration)
        reason = generation.message.response_metadata.get("finish_reason")
        if reason is None:
            return super().parse_result(result, partial=partial)
        try:
            json.loads(generation.text)
        except ValueError as error:
            message = f"the output ended before its JSON: {reason}"
            raise OutputParserException(message, llm_output=generation.text) from error
        return super().parse_result(result)


class _WholePydanticParser(_WholeJsonParser, PydanticOutputParser[Any]):
    pass


def _role(message: BaseMessage) -> Role:
    for kind, role in ((SystemMessage, Role.SYSTEM), (HumanMessage, Role.USER), (AIMessage, Role.ASSISTANT)):
        if isinstance(message, kind):
            return role
    raise ValueError(f"messages of type {message.type} are not supported: only system, human and ai")


def _text(message: BaseMessage) -> str:
    if isinstance(message, AIMessage) and message.tool_calls:
        raise ValueError("tool calls are not supported")
    parts = [message.content] if isinstance(message.content, str) else message.content
    return "".join(map(_part_text, parts))


def _part_text(part: str | dict[str, Any]) -> str:
    if isinstance(part, str):
        return part
    if part.get("type") != "text":
        raise ValueError(f"content of type {part.get('type')} is not supported: only text")
    text: str = part["text"]
    return text


def _check_single(delta: Delta) -> None:
    if delta.index:
        raise ValueError("num_sequences: a stream has one output")


def _part(part: Delta | Output) -> dict[str, Any]:
    """What was asked for beside the text; LangChain joins the lists of a stream's chunks."""
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
    """LangChain has no other place for the usage of text; the first output has that of all."""
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
    """In the form of OpenAI's, as other chat models of LangChain give it."""
    return _token(logprob) | {"top_logprobs": [_token(top) for top in logprob.top]}


def _token(token: TokenLogprob | TopLogprob) -> dict[str, Any]:
    text = token.bytes.decode(errors="replace")
    return {"token": text, "bytes": list(token.bytes), "token_id": token.token_id, "logprob": token.logprob}
