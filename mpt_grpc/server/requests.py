"""The translation of a request's message into a `GenerationRequest`. protobuf is not used in the layers below."""

from __future__ import annotations

import uuid
from typing import Any

from mpt_grpc.caller import Caller
from mpt_grpc.constraint import Choice, Constraint, JsonObject, JsonSchema, LarkGrammar, Regex
from mpt_grpc.conversation import Conversation, Message, Tool, ToolCall, ToolChoice
from mpt_grpc.errors import FieldViolation, InvalidRequestError
from mpt_grpc.json_values import parse_object
from mpt_grpc.request import (
    CacheOptions,
    ChunkOptions,
    DecodingOptions,
    GenerationDefaults,
    GenerationRequest,
    LogprobOptions,
    PartialOutput,
    RepetitionGuard,
    SamplingParameters,
    StoppingCriteria,
)
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

_MAX_DURATION_S = 315_576_000_000
_MAX_KWARGS_DEPTH = 32
_ROLES: dict[int, str] = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}
_TOOL_CHOICES: dict[int, ToolChoice] = {
    pb.TOOL_CHOICE_UNSPECIFIED: ToolChoice.AUTO,
    pb.TOOL_CHOICE_AUTO: ToolChoice.AUTO,
    pb.TOOL_CHOICE_NONE: ToolChoice.NONE,
    pb.TOOL_CHOICE_REQUIRED: ToolChoice.REQUIRED,
}


def generation_request(message: pb.GenerateRequest, defaults: GenerationDefaults, caller: Caller) -> GenerationRequest:
    """Returns the caller's request with `defaults` for options that are not set. The engine checks ranges and the
    prompt.

    The message's sizes must have been checked. Raises InvalidRequestError for an invalid duration or invalid
    `chat_template_kwargs`.
    """
    output = message.output_options
    return GenerationRequest(
        request_id=message.request_id or str(uuid.uuid4()),
        prompt=_prompt(message),
        sampling=_sampling(message.sampling, defaults),
        decoding=_decoding(message.decoding, defaults),
        stopping=_stopping(message.stopping),
        logprobs=LogprobOptions(output.return_prompt_logprobs, output.return_logprobs, output.top_logprobs),
        chunks=ChunkOptions(
            output.chunk_tokens if output.HasField("chunk_tokens") else None,
            _seconds(output, "chunk_interval", "output_options"),
        ),
        cache=CacheOptions(bypass=message.cache.bypass, salt=message.cache.salt or caller.cache_salt),
        priority=message.priority,
        skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
        truncate_prompt_tokens=message.truncate_prompt_tokens if message.HasField("truncate_prompt_tokens") else None,
        resume_token_ids=tuple(message.resume_token_ids),
        caller=caller,
        resume_outputs=tuple(PartialOutput(output.index, tuple(output.token_ids)) for output in message.resume_outputs),
    )


def _prompt(message: pb.GenerateRequest) -> str | tuple[int, ...] | Conversation:
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "conversation":
            return _conversation(message.conversation)
        case _:
            return tuple(message.token_ids.ids)


def _conversation(message: pb.Conversation) -> Conversation:
    if message.tool_choice not in _TOOL_CHOICES:
        why = f"{message.tool_choice} is not a choice: use TOOL_CHOICE_AUTO, _NONE or _REQUIRED"
        raise InvalidRequestError(FieldViolation("conversation.tool_choice", why))
    return Conversation(
        messages=tuple(map(_message, message.messages)),
        drop_oldest_turns=message.drop_oldest_turns,
        add_generation_prompt=message.add_generation_prompt if message.HasField("add_generation_prompt") else True,
        chat_template_kwargs=_template_kwargs(message.chat_template_kwargs or "{}"),
        tools=tuple(Tool(tool.name, tool.description, tool.parameters) for tool in message.tools),
        tool_choice=_TOOL_CHOICES[message.tool_choice],
        allowed_tools=tuple(message.allowed_tools),
        parallel_tool_calls=message.parallel_tool_calls if message.HasField("parallel_tool_calls") else True,
        continue_final_message=message.continue_final_message,
    )


def _message(message: pb.Message) -> Message:
    calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls)
    return Message(_ROLES.get(message.role, ""), message.content, calls, message.tool_call_id)


def _template_kwargs(text: str) -> dict[str, Any]:
    """Returns the values of a JSON object. Raises InvalidRequestError."""
    try:
        return parse_object(text, _MAX_KWARGS_DEPTH)
    except ValueError as error:
        raise InvalidRequestError(FieldViolation("conversation.chat_template_kwargs", str(error))) from error


def _sampling(message: pb.SamplingParameters, defaults: GenerationDefaults) -> SamplingParameters:
    return SamplingParameters(
        temperature=message.temperature if message.HasField("temperature") else defaults.temperature,
        top_k=message.top_k if message.HasField("top_k") else defaults.top_k,
        top_p=message.top_p if message.HasField("top_p") else defaults.top_p,
        min_p=message.min_p if message.HasField("min_p") else defaults.min_p,
        typical_p=message.typical_p if message.HasField("typical_p") else defaults.typical_p,
        seed=message.seed if message.HasField("seed") else None,
        num_sequences=message.num_sequences if message.HasField("num_sequences") else 1,
    )


def _decoding(message: pb.DecodingOptions, defaults: GenerationDefaults) -> DecodingOptions:
    return DecodingOptions(
        repetition_penalty=(
            message.repetition_penalty if message.HasField("repetition_penalty") else defaults.repetition_penalty
        ),
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        logit_bias=dict(message.logit_bias),
        allowed_token_ids=tuple(message.allowed_token_ids),
        constraint=_constraint(message),
    )


def _constraint(message: pb.DecodingOptions) -> Constraint | None:
    kind = message.WhichOneof("constraint")
    max_whitespace = message.max_whitespace if message.HasField("max_whitespace") else None
    if max_whitespace is not None and kind not in ("json_schema", "json_object"):
        why = "requires a JSON Schema or a JSON object as the constraint"
        raise InvalidRequestError(FieldViolation("decoding.max_whitespace", why))
    match kind:
        case "json_schema":
            return JsonSchema(message.json_schema, max_whitespace)
        case "json_object":
            return JsonObject(max_whitespace)
        case "regex":
            return Regex(message.regex)
        case "choice":
            return Choice(tuple(message.choice.options))
        case "lark_grammar":
            return LarkGrammar(message.lark_grammar)
        case _:
            return None


def _stopping(message: pb.StoppingCriteria) -> StoppingCriteria:
    return StoppingCriteria(
        max_new_tokens=message.max_new_tokens if message.HasField("max_new_tokens") else None,
        min_new_tokens=message.min_new_tokens,
        stop_strings=tuple(message.stop_strings),
        stop_token_ids=tuple(message.stop_token_ids),
        include_stop_string=message.include_stop_string,
        ignore_eos=message.ignore_eos,
        time_limit_s=_seconds(message, "time_limit", "stopping"),
        repetition_guard=_repetition_guard(message.repetition_guard) if message.HasField("repetition_guard") else None,
    )


def _seconds(message: Any, field: str, parent: str) -> float | None:
    """Returns a duration, or None if unset. Raises InvalidRequestError for a value that protobuf does not define."""
    if not message.HasField(field):
        return None
    seconds, nanos = getattr(message, field).seconds, getattr(message, field).nanos
    if abs(seconds) > _MAX_DURATION_S or abs(nanos) >= 1_000_000_000 or seconds * nanos < 0:
        why = f"{seconds} s and {nanos} ns are not a valid duration"
        raise InvalidRequestError(FieldViolation(f"{parent}.{field}", why))
    return float(seconds + nanos / 1e9)


def _repetition_guard(message: pb.RepetitionGuard) -> RepetitionGuard:
    defaults = RepetitionGuard()
    return RepetitionGuard(
        min_repeats=message.min_repeats if message.HasField("min_repeats") else defaults.min_repeats,
        max_cycle_tokens=(
            message.max_cycle_tokens if message.HasField("max_cycle_tokens") else defaults.max_cycle_tokens
        ),
    )
