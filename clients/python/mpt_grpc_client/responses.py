"""The one translation from the API's messages into the client's values."""

from __future__ import annotations

from collections import defaultdict

from google.protobuf.duration_pb2 import Duration

from mpt.v1 import text_generation_pb2 as pb
from mpt_grpc_client.results import (
    Delta,
    EngineState,
    Finish,
    FinishReason,
    Generation,
    Limits,
    Load,
    ModelInfo,
    Output,
    RequestState,
    SequenceState,
    ServerInfo,
    Timings,
    Token,
    TokenLogprob,
    TopLogprob,
    Usage,
)


class PartialGeneration:
    """A generation as far as it has come: the sum of an answer's pieces. Its properties are of the first output."""

    def __init__(self) -> None:
        self.request_id = ""
        """Empty until the first piece has come."""
        self._deltas: defaultdict[int, list[Delta]] = defaultdict(list)
        self._seeds: dict[int, int] = {}
        self._prompt = pb.PromptInfo()
        self._result: Generation | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(delta.text for delta in self._deltas[0])

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(delta.num_tokens for delta in self._deltas[0])

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token ids so far; empty unless asked for by `return_token_ids`."""
        return tuple(token_id for delta in self._deltas[0] for token_id in delta.token_ids)

    @property
    def finish(self) -> Finish | None:
        """Why the output ended; None while it has not."""
        return self._deltas[0][-1].finish if self._deltas[0] else None

    @property
    def usage(self) -> Usage | None:
        """The token counts; None while not all outputs have ended."""
        return self._result.usage if self._result else None

    @property
    def result(self) -> Generation:
        """The whole generation. Raises RuntimeError while it has not ended, or if it was left early or failed."""
        if self._result is None:
            raise RuntimeError("the generation has not ended")
        return self._result

    def _add(self, piece: pb.StreamGenerateResponse) -> Delta:
        """Takes the answer's next piece in and gives what is new."""
        self.request_id = piece.request_id
        if piece.HasField("prompt"):
            self._prompt = piece.prompt
        delta = self._add_output(piece.output)
        if piece.HasField("summary"):
            self._end(piece.summary)
        return delta

    def _add_output(self, output: pb.Output) -> Delta:
        delta = Delta(
            index=output.index,
            text=output.text,
            num_tokens=output.num_tokens,
            token_ids=tuple(output.token_ids),
            logprobs=tuple(map(_logprob, output.logprobs)),
            finish=_finish(output.finish) if output.HasField("finish") else None,
        )
        self._deltas[output.index].append(delta)
        self._seeds[output.index] = output.seed
        return delta

    def _end(self, summary: pb.Summary) -> None:
        self._result = Generation(
            request_id=self.request_id,
            outputs=tuple(_output(deltas, self._seeds[index]) for index, deltas in sorted(self._deltas.items())),
            prompt_token_ids=tuple(self._prompt.token_ids),
            prompt_logprobs=tuple(map(_logprob, self._prompt.logprobs)),
            usage=_usage(summary.usage),
            timings=_timings(summary.timings),
            seed=summary.seed,
            trace_id=summary.trace_id,
        )


def generation(response: pb.GenerateResponse) -> Generation:
    whole = PartialGeneration()
    whole.request_id, whole._prompt = response.request_id, response.prompt
    for output in response.outputs:
        whole._add_output(output)
    whole._end(response.summary)
    return whole.result


def tokens(response: pb.TokenizeResponse) -> tuple[Token, ...]:
    return tuple(Token(id=token.id, bytes=token.bytes) for token in response.tokens)


def model_info(response: pb.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        name=response.name,
        num_parameters=response.num_parameters,
        dtype=response.dtype,
        device=response.device,
        vocab_size=response.vocab_size,
        max_context_tokens=response.max_context_tokens,
        eos_token_ids=tuple(response.eos_token_ids),
        num_layers=response.num_layers,
        hidden_size=response.hidden_size,
        num_heads=response.num_heads,
        num_kv_heads=response.num_kv_heads,
        chat_template=response.chat_template,
    )


def server_info(response: pb.GetServerInfoResponse) -> ServerInfo:
    limits = response.limits
    return ServerInfo(
        version=response.version,
        uptime_s=_seconds(response.uptime),
        limits=Limits(
            max_running_requests=limits.max_running_requests,
            max_waiting_requests=limits.max_waiting_requests,
            max_step_tokens=limits.max_step_tokens,
            max_message_bytes=limits.max_message_bytes,
            cache_tokens=limits.cache_tokens,
        ),
        load=_load(response.load),
    )


def engine_state(response: pb.GetEngineStateResponse) -> EngineState:
    return EngineState(
        time_s=response.time.ToNanoseconds() / 1e9,
        load=_load(response.load),
        kept_blocks=tuple(response.kept_blocks),
        in_flight=tuple(map(_request_state, response.in_flight)),
        ended=tuple(map(_request_state, response.ended)),
    )


def _load(load: pb.Load) -> Load:
    return Load(
        running_requests=load.running_requests,
        waiting_requests=load.waiting_requests,
        total_blocks=load.total_blocks,
        free_blocks=load.free_blocks,
        steps=load.steps,
        generated_tokens=load.generated_tokens,
        batched_sequences=load.batched_sequences,
    )


def _request_state(state: pb.RequestState) -> RequestState:
    return RequestState(
        request_id=state.request_id,
        arrival_time_s=state.arrival_time.ToNanoseconds() / 1e9,
        end_time_s=state.end_time.ToNanoseconds() / 1e9 if state.HasField("end_time") else None,
        timings=_timings(state.timings),
        usage=_usage(state.usage),
        sequences=tuple(map(_sequence_state, state.sequences)),
    )


def _sequence_state(state: pb.SequenceState) -> SequenceState:
    return SequenceState(
        index=state.index,
        num_computed_tokens=state.num_computed_tokens,
        num_output_tokens=state.num_output_tokens,
        blocks=tuple(state.blocks),
        finish_reason=FinishReason(state.finish_reason) if state.HasField("finish_reason") else None,
    )


def _output(deltas: list[Delta], seed: int) -> Output:
    finish = deltas[-1].finish
    assert finish is not None, "the server ends each output before the call"
    return Output(
        index=deltas[0].index,
        text="".join(delta.text for delta in deltas),
        num_tokens=sum(delta.num_tokens for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        finish=finish,
        seed=seed,
    )


def _logprob(logprob: pb.Logprob) -> TokenLogprob:
    return TokenLogprob(
        token_id=logprob.token_id,
        bytes=logprob.bytes,
        logprob=logprob.logprob,
        rank=logprob.rank,
        top=tuple(TopLogprob(top.token_id, top.bytes, top.logprob) for top in logprob.top),
    )


def _finish(finish: pb.Finish) -> Finish:
    return Finish(
        reason=FinishReason(finish.reason),
        stop_token_id=finish.stop_token_id if finish.HasField("stop_token_id") else None,
        stop_string=finish.stop_string if finish.HasField("stop_string") else None,
    )


def _usage(usage: pb.Usage) -> Usage:
    return Usage(
        num_prompt_tokens=usage.num_prompt_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        num_output_tokens=usage.num_output_tokens,
        num_preemptions=usage.num_preemptions,
    )


def _timings(timings: pb.Timings) -> Timings:
    return Timings(
        queue_s=_seconds(timings.queue) if timings.HasField("queue") else None,
        prefill_s=_seconds(timings.prefill) if timings.HasField("prefill") else None,
        decode_s=_seconds(timings.decode) if timings.HasField("decode") else None,
        time_to_first_token_s=(
            _seconds(timings.time_to_first_token) if timings.HasField("time_to_first_token") else None
        ),
    )


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
