"""The one translation from the API's messages into the client's values."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from mpt.v1 import text_generation_pb2 as pb
from mpt_grpc_client.results import (
    Finish,
    FinishReason,
    Generation,
    Limits,
    Load,
    ModelInfo,
    ServerInfo,
    Timings,
    Token,
    Usage,
)


class PartialGeneration:
    """A generation as far as it has come: the sum of an answer's pieces. An answer that comes whole is one piece."""

    def __init__(self) -> None:
        self.request_id = ""
        """Empty until the first piece has come."""
        self.num_tokens = 0
        """Tokens generated so far."""
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._prompt_token_ids: tuple[int, ...] = ()
        self._result: Generation | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token ids so far; empty unless asked for by `return_token_ids`."""
        return tuple(self._token_ids)

    @property
    def finish(self) -> Finish | None:
        """Why the output ended; None while it has not."""
        return self._result.finish if self._result else None

    @property
    def usage(self) -> Usage | None:
        """The token counts; None while the output has not ended."""
        return self._result.usage if self._result else None

    @property
    def result(self) -> Generation:
        """The whole generation. Raises RuntimeError while it has not ended, or if it was left early or failed."""
        if self._result is None:
            raise RuntimeError("the generation has not ended")
        return self._result

    def _add(self, piece: pb.StreamGenerateResponse | pb.GenerateResponse) -> str:
        """Takes the answer's next piece in and gives the text that is new, which may be empty."""
        output = piece.output
        self.request_id = piece.request_id
        self.num_tokens += output.num_tokens
        self._texts.append(output.text)
        self._token_ids += output.token_ids
        if piece.HasField("prompt"):
            self._prompt_token_ids = tuple(piece.prompt.token_ids)
        if output.HasField("finish"):
            self._result = Generation(
                request_id=self.request_id,
                text=self.text,
                num_tokens=self.num_tokens,
                token_ids=self.token_ids,
                prompt_token_ids=self._prompt_token_ids,
                finish=_finish(output.finish),
                usage=_usage(piece.summary.usage),
                timings=_timings(piece.summary.timings),
                seed=piece.summary.seed,
                trace_id=piece.summary.trace_id,
            )
        return output.text


def generation(response: pb.GenerateResponse) -> Generation:
    whole = PartialGeneration()
    whole._add(response)
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
    )


def server_info(response: pb.GetServerInfoResponse) -> ServerInfo:
    limits, load = response.limits, response.load
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
        load=Load(
            running_requests=load.running_requests,
            waiting_requests=load.waiting_requests,
            total_blocks=load.total_blocks,
            free_blocks=load.free_blocks,
            steps=load.steps,
            generated_tokens=load.generated_tokens,
            batched_sequences=load.batched_sequences,
        ),
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
