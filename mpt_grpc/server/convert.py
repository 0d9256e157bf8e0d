"""Messages of `mpt.v1` to the domain's values and back. protobuf goes no further into the house."""

from __future__ import annotations

import uuid

from google.protobuf.duration_pb2 import Duration

from mpt.v1 import text_generation_pb2 as pb
from mpt_grpc.engine.admission import RequestLimits
from mpt_grpc.engine.engine import EngineLoad
from mpt_grpc.engine.load import LoadedModel
from mpt_grpc.request import (
    CacheOptions,
    Finish,
    FinishReason,
    GenerationRequest,
    RequestStats,
    SamplingParameters,
    StoppingCriteria,
)
from mpt_grpc.text.tokenizer import Tokenizer

_FINISH_REASONS = {
    FinishReason.MAX_NEW_TOKENS: pb.FINISH_REASON_MAX_NEW_TOKENS,
    FinishReason.EOS_TOKEN: pb.FINISH_REASON_EOS_TOKEN,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.CONTEXT_LENGTH: pb.FINISH_REASON_CONTEXT_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}


def generation_request(message: pb.GenerateRequest) -> GenerationRequest:
    """Ranges, and a prompt that is missing, are the engine's to find."""
    has_text = message.WhichOneof("prompt") == "text"
    sampling, stopping, response = message.sampling, message.stopping, message.response
    return GenerationRequest(
        request_id=message.request_id or str(uuid.uuid4()),
        prompt=message.text if has_text else tuple(message.token_ids.ids),
        sampling=SamplingParameters(
            temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
            top_k=sampling.top_k,
            top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
            min_p=sampling.min_p,
            seed=sampling.seed if sampling.HasField("seed") else None,
        ),
        stopping=StoppingCriteria(
            max_new_tokens=stopping.max_new_tokens if stopping.HasField("max_new_tokens") else None,
            stop_strings=tuple(stopping.stop_strings),
            stop_token_ids=tuple(stopping.stop_token_ids),
            include_stop_string=stopping.include_stop_string,
            ignore_eos=stopping.ignore_eos,
        ),
        cache=CacheOptions(bypass=message.cache.bypass, salt=message.cache.salt),
        priority=message.priority,
        skip_special_tokens=response.skip_special_tokens if response.HasField("skip_special_tokens") else True,
    )


def prompt_info(token_ids: tuple[int, ...], options: pb.ResponseOptions) -> pb.PromptInfo:
    return pb.PromptInfo(num_tokens=len(token_ids), token_ids=token_ids if options.prompt_token_ids else ())


def output(text: str, token_ids: tuple[int, ...], finish: Finish | None, options: pb.ResponseOptions) -> pb.Output:
    return pb.Output(
        text=text,
        num_tokens=len(token_ids),
        token_ids=token_ids if options.output_token_ids else (),
        finish=None if finish is None else _finish(finish),
    )


def summary(stats: RequestStats, num_output_tokens: int, trace_id: str) -> pb.Summary:
    return pb.Summary(
        usage=pb.Usage(
            num_prompt_tokens=stats.num_prompt_tokens,
            num_cached_tokens=stats.num_cached_tokens,
            num_output_tokens=num_output_tokens,
            num_preemptions=stats.num_preemptions,
        ),
        timings=pb.Timings(
            queue=_duration(stats.arrival_time_s, stats.scheduled_time_s),
            prefill=_duration(stats.scheduled_time_s, stats.first_token_time_s),
            decode=_duration(stats.first_token_time_s, stats.end_time_s),
            time_to_first_token=_duration(stats.arrival_time_s, stats.first_token_time_s),
        ),
        seed=stats.seed,
        trace_id=trace_id,
    )


def tokens(tokenizer: Tokenizer, text: str) -> pb.TokenizeResponse:
    ids = tokenizer.encode(text)
    return pb.TokenizeResponse(tokens=[pb.Token(id=token, bytes=tokenizer.token_bytes(token)) for token in ids])


def model_info(model: LoadedModel, limits: RequestLimits, eos: frozenset[int]) -> pb.GetModelInfoResponse:
    return pb.GetModelInfoResponse(
        name=model.name,
        num_parameters=model.num_parameters,
        dtype=model.dtype,
        device=model.device,
        vocab_size=limits.vocab_size,
        max_context_tokens=limits.max_context_tokens,
        eos_token_ids=sorted(eos),
        num_layers=model.config.n_layers,
        hidden_size=model.config.d_model,
        num_heads=model.config.n_heads,
        num_kv_heads=model.config.n_kv_heads,
    )


def load(load: EngineLoad, total_blocks: int) -> pb.Load:
    return pb.Load(
        running_requests=load.num_running,
        waiting_requests=load.num_waiting,
        total_blocks=total_blocks,
        free_blocks=load.num_free_blocks,
        steps=load.num_steps,
        generated_tokens=load.num_generated_tokens,
        batched_sequences=load.num_batched_sequences,
    )


def duration(seconds: float) -> Duration:
    result = Duration()
    result.FromNanoseconds(round(seconds * 1e9))
    return result


def _finish(finish: Finish) -> pb.Finish:
    message = pb.Finish(reason=_FINISH_REASONS[finish.reason])
    if finish.stop_token_id is not None:
        message.stop_token_id = finish.stop_token_id
    if finish.stop_string is not None:
        message.stop_string = finish.stop_string
    return message


def _duration(start_s: float | None, end_s: float | None) -> Duration | None:
    return None if start_s is None or end_s is None else duration(end_s - start_s)
