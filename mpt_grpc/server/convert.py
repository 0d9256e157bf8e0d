"""The translation of the server's values into the API's messages. protobuf is not used in the layers below."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mpt_grpc.conversation import ToolCall
from mpt_grpc.engine.load import LoadedModel
from mpt_grpc.engine.prepare import Preparation
from mpt_grpc.engine.state import EngineLoad, EngineState, RequestState
from mpt_grpc.results import Finish, FinishReason, RequestStats, TokenLogprob
from mpt_grpc.text.tokenizer import Tokenizer
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1alpha1 import debug_pb2

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


def add_logprobs(message: pb.PromptInfo | pb.Output, values: Iterable[TokenLogprob], tokenizer: Tokenizer) -> None:
    """Adds log probabilities one by one: copying a long list of messages would stop all threads."""
    for value in values:
        logprob = message.logprobs.add(
            token_id=value.token_id,
            token_bytes=tokenizer.token_bytes(value.token_id),
            logprob=value.logprob,
            rank=value.rank,
        )
        for token_id, top_logprob in value.top:
            token_bytes = tokenizer.token_bytes(token_id)
            logprob.top_logprobs.add(token_id=token_id, token_bytes=token_bytes, logprob=top_logprob)


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
    response = pb.TokenizeResponse()
    for token in token_ids:  # one by one, as log probabilities
        response.tokens.add(token_id=token, token_bytes=tokenizer.token_bytes(token))
    return response


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
