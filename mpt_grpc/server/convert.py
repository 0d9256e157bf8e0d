"""The translation between the API's messages and the server's values. protobuf is not used in the layers below."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any, NoReturn

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mpt_grpc.caller import ANONYMOUS, Caller
from mpt_grpc.engine.load import LoadedModel
from mpt_grpc.engine.prepare import Preparation
from mpt_grpc.engine.state import EngineLoad, EngineState, RequestState
from mpt_grpc.errors import FieldViolation, InvalidRequestError
from mpt_grpc.limits import is_deeper_than
from mpt_grpc.request import (
    CacheOptions,
    Choice,
    ChunkOptions,
    Constraint,
    Conversation,
    DecodingOptions,
    Finish,
    FinishReason,
    GenerationDefaults,
    GenerationRequest,
    JsonObject,
    JsonSchema,
    LarkGrammar,
    LogprobOptions,
    Message,
    PartialOutput,
    Regex,
    RepetitionGuard,
    RequestStats,
    SamplingParameters,
    StoppingCriteria,
    TokenLogprob,
    Tool,
    ToolCall,
    ToolChoice,
)
from mpt_grpc.text.tokenizer import Tokenizer
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1alpha1 import debug_pb2

_MAX_DURATION_S = 315_576_000_000
_MAX_KWARGS_DEPTH = 32
_TOO_DEEP = f"nested more than {_MAX_KWARGS_DEPTH} levels deep: simplify it"
_FINISH_REASONS = {
    FinishReason.MAX_NEW_TOKENS: pb.FINISH_REASON_MAX_NEW_TOKENS,
    FinishReason.EOS_TOKEN: pb.FINISH_REASON_EOS_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.CONTEXT_LENGTH: pb.FINISH_REASON_CONTEXT_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.TIME_LIMIT: pb.FINISH_REASON_TIME_LIMIT,
    FinishReason.REPETITION: pb.FINISH_REASON_REPETITION,
    FinishReason.CONTENT_FILTER: pb.FINISH_REASON_CONTENT_FILTER,
    FinishReason.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}
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


def generation_request(
    message: pb.GenerateRequest, defaults: GenerationDefaults, caller: Caller = ANONYMOUS
) -> GenerationRequest:
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


def logprobs(values: Iterable[TokenLogprob], tokenizer: Tokenizer) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=value.token_id,
            token_bytes=tokenizer.token_bytes(value.token_id),
            logprob=value.logprob,
            rank=value.rank,
            top_logprobs=[
                pb.TopLogprob(token_id=token_id, token_bytes=tokenizer.token_bytes(token_id), logprob=logprob)
                for token_id, logprob in value.top
            ],
        )
        for value in values
    ]


def tool_calls(values: Iterable[ToolCall]) -> list[pb.ToolCall]:
    return [pb.ToolCall(index=value.index, id=value.id, name=value.name, arguments=value.arguments) for value in values]


def finish(value: Finish) -> pb.Finish:
    message = pb.Finish(reason=_FINISH_REASONS[value.reason])
    if value.stop_token_id is not None:
        message.stop_token_id = value.stop_token_id
    if value.stop_string is not None:
        message.stop_string = value.stop_string
    return message


def summary(stats: RequestStats, trace_id: str) -> pb.Summary:
    return pb.Summary(usage=_usage(stats), timings=_timings(stats), seed=stats.seed, trace_id=trace_id)


def tokens(tokenizer: Tokenizer, token_ids: Iterable[int]) -> pb.TokenizeResponse:
    return pb.TokenizeResponse(
        tokens=[pb.Token(token_id=token, token_bytes=tokenizer.token_bytes(token)) for token in token_ids]
    )


def model_info(model: LoadedModel, preparation: Preparation) -> pb.GetModelInfoResponse:
    limits = preparation.limits
    return pb.GetModelInfoResponse(
        name=model.name,
        num_parameters=model.num_parameters,
        dtype=model.dtype,
        device=model.device,
        vocab_size=limits.vocab_size,
        max_context_tokens=limits.max_context_tokens,
        eos_token_ids=sorted(preparation.tokenizer.eos_token_ids),
        num_layers=model.config.n_layers,
        hidden_size=model.config.d_model,
        num_heads=model.config.n_heads,
        num_kv_heads=model.config.n_kv_heads,
        chat_template=preparation.chat_template.name,
        defaults=pb.GenerationDefaults(
            temperature=model.defaults.temperature,
            top_k=model.defaults.top_k,
            top_p=model.defaults.top_p,
            min_p=model.defaults.min_p,
            typical_p=model.defaults.typical_p,
            repetition_penalty=model.defaults.repetition_penalty,
            max_new_tokens=model.defaults.max_new_tokens,
        ),
    )


def load(load: EngineLoad, num_blocks: int) -> pb.Load:
    return pb.Load(
        num_running_requests=load.num_running,
        num_waiting_requests=load.num_waiting,
        num_blocks=num_blocks,
        num_free_blocks=load.num_free_blocks,
        num_steps=load.num_steps,
        num_output_tokens=load.num_generated_tokens,
        num_batched_sequences=load.num_batched_sequences,
        num_preparing_requests=load.num_preparing,
        num_draft_tokens=load.num_draft_tokens,
        num_accepted_tokens=load.num_accepted_tokens,
    )


def engine_state(state: EngineState, num_blocks: int) -> debug_pb2.GetEngineStateResponse:
    return debug_pb2.GetEngineStateResponse(
        time=_timestamp(state.time_s),
        load=load(state.load, num_blocks),
        cached_blocks=state.cached_blocks,
        active_requests=[_request_state(request, has_ended=False) for request in state.in_flight],
        completed_requests=[_request_state(request, has_ended=True) for request in state.ended],
    )


def duration(seconds: float) -> Duration:
    result = Duration()
    result.FromNanoseconds(round(seconds * 1e9))
    return result


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
    )


def _message(message: pb.Message) -> Message:
    calls = tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls)
    return Message(_ROLES.get(message.role, ""), message.content, calls, message.tool_call_id)


def _template_kwargs(text: str) -> dict[str, Any]:
    """Returns the values of a JSON object. Raises InvalidRequestError."""
    field = "conversation.chat_template_kwargs"
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
        text.encode()
        json.dumps(values, ensure_ascii=False).encode()
    except RecursionError as error:
        raise InvalidRequestError(FieldViolation(field, _TOO_DEEP)) from error
    except UnicodeEncodeError as error:
        raise InvalidRequestError(FieldViolation(field, "not valid Unicode: remove lone surrogates")) from error
    except ValueError as error:
        raise InvalidRequestError(FieldViolation(field, f"not valid JSON: {error}")) from error
    if not isinstance(values, dict):
        raise InvalidRequestError(FieldViolation(field, "must be a JSON object"))
    if is_deeper_than(values, _MAX_KWARGS_DEPTH):
        raise InvalidRequestError(FieldViolation(field, _TOO_DEEP))
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


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
    kind, max_whitespace = message.WhichOneof("constraint"), JsonObject().max_whitespace
    if message.HasField("max_whitespace"):
        max_whitespace = message.max_whitespace
        if kind not in ("json_schema", "json_object"):
            raise InvalidRequestError(FieldViolation("decoding.max_whitespace", "requires json_schema or json_object"))
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


def _request_state(state: RequestState, has_ended: bool) -> debug_pb2.RequestState:
    stats = state.stats
    return debug_pb2.RequestState(
        request_id=state.request_id,
        arrival_time=_timestamp(stats.arrival_time_s),
        end_time=_timestamp(stats.end_time_s) if has_ended else None,
        timings=_timings(stats),
        usage=_usage(stats),
        sequences=[
            debug_pb2.SequenceState(
                index=sequence.index,
                num_computed_tokens=sequence.num_computed_tokens,
                num_output_tokens=sequence.num_output_tokens,
                blocks=sequence.blocks,
                finish_reason=None if sequence.finish_reason is None else _FINISH_REASONS[sequence.finish_reason],
            )
            for sequence in state.sequences
        ],
    )


def _usage(stats: RequestStats) -> pb.Usage:
    return pb.Usage(
        num_prompt_tokens=stats.num_prompt_tokens,
        num_cached_tokens=stats.num_cached_tokens,
        num_output_tokens=stats.num_output_tokens,
        num_preemptions=stats.num_preemptions,
    )


def _timings(stats: RequestStats) -> pb.Timings:
    return pb.Timings(
        queue_time=_duration(stats.arrival_time_s, stats.scheduled_time_s),
        prefill_time=_duration(stats.scheduled_time_s, stats.first_token_time_s),
        decode_time=_duration(stats.first_token_time_s, stats.end_time_s),
        time_to_first_token=_duration(stats.arrival_time_s, stats.first_token_time_s),
    )


def _timestamp(time_s: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round(time_s * 1e9))
    return timestamp


def _duration(start_s: float | None, end_s: float | None) -> Duration | None:
    return None if start_s is None or end_s is None else duration(end_s - start_s)
