"""The translation of the API's messages into the client's values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from google.protobuf.duration_pb2 import Duration

from mpt_grpc_client.errors import UnavailableError
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.results import (
    Delta,
    Finish,
    FinishReason,
    Generation,
    Output,
    Resumption,
    Timings,
    Token,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mpt_grpc_client.server_info import GenerationDefaults, Limits, Load, ModelInfo, ServerInfo
from mpt_grpc_client.tools import ToolCall, ToolCallDelta

_PARTS_OF_LOGPROB = 32
"""With 20 alternatives, converting a log probability takes as long as that many tokens."""


class PartialGeneration:
    """A generation in progress: the sum of the chunks received so far. Its properties describe the first output."""

    def __init__(self) -> None:
        self.request_id = ""
        """Empty until the first chunk has arrived."""
        self._deltas: defaultdict[int, list[Delta]] = defaultdict(list)
        self._keeps_logprobs = True
        self._seeds: dict[int, int] = {}
        self._prompt_token_ids: tuple[int, ...] = ()
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._result: Generation | None = None
        self._resumptions: Sequence[Resumption] = ()

    @property
    def resumptions(self) -> tuple[Resumption, ...]:
        """The servers that have continued the generation so far."""
        return tuple(self._resumptions)

    @property
    def text(self) -> str:
        """The text received so far."""
        return "".join(delta.text for delta in self._deltas[0])

    @property
    def num_tokens(self) -> int:
        """The number of tokens generated so far."""
        return sum(delta.num_tokens for delta in self._deltas[0])

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token IDs received so far; empty unless requested by `return_token_ids`."""
        return tuple(token_id for delta in self._deltas[0] for token_id in delta.token_ids)

    @property
    def finish(self) -> Finish | None:
        """Why the output ended; None while it is in progress."""
        return self._deltas[0][-1].finish if self._deltas[0] else None

    @property
    def usage(self) -> Usage | None:
        """The token counts; None until all outputs have ended."""
        return self._result.usage if self._result else None

    @property
    def result(self) -> Generation:
        """The complete generation. Raises RuntimeError while it is in progress, and if it was cancelled or failed."""
        if self._result is None:
            raise RuntimeError("the generation is incomplete: iterate over the stream to its end first")
        return self._result

    @property
    def _progress(self) -> str:
        """How far it has come, for the text of an error."""
        num_tokens = sum(delta.num_tokens for deltas in self._deltas.values() for delta in deltas)
        return f"after {num_tokens} tokens" if num_tokens else "before the first token"

    def _add(self, chunk: pb.StreamGenerateResponse) -> Delta:
        """Adds the next chunk and returns the new part of the output."""
        self.request_id = chunk.request_id
        if chunk.HasField("prompt"):
            self._add_prompt(chunk.prompt)
        delta = self._add_output(chunk.output)
        if chunk.HasField("summary"):
            self._complete(chunk.summary)
        return delta

    def _add_prompt(self, prompt: pb.PromptInfo) -> None:
        self._prompt_token_ids = tuple(prompt.token_ids)
        self._prompt_logprobs = tuple(map(_logprob, prompt.logprobs))

    def _add_output(self, output: pb.Output) -> Delta:
        delta = Delta(
            index=output.index,
            text=output.text,
            num_tokens=output.num_tokens,
            token_ids=tuple(output.token_ids),
            logprobs=tuple(map(_logprob, output.logprobs)),
            finish=_finish(output.finish) if output.HasField("finish") else None,
            tool_calls=tuple(ToolCallDelta(c.index, c.id, c.name, c.arguments) for c in output.tool_calls),
        )
        is_kept_whole = self._keeps_logprobs or not delta.logprobs
        self._deltas[output.index].append(delta if is_kept_whole else replace(delta, logprobs=()))
        self._seeds[output.index] = output.seed
        return delta

    def _complete(self, summary: pb.Summary) -> None:
        self._result = Generation(
            request_id=self.request_id,
            outputs=tuple(_output(deltas, self._seeds[index]) for index, deltas in sorted(self._deltas.items())),
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs,
            usage=usage(summary.usage),
            timings=timings(summary.timings),
            seed=summary.seed,
            trace_id=summary.trace_id,
            resumptions=self.resumptions,
        )


def num_parts(*parts: pb.PromptInfo | pb.Output) -> int:
    """Returns the number of values in these: tokens, and log probabilities, each with all its alternatives."""
    return sum(len(part.token_ids) + _PARTS_OF_LOGPROB * len(part.logprobs) for part in parts)


def generation(response: pb.GenerateResponse) -> Generation:
    partial = PartialGeneration()
    partial.request_id = response.request_id
    partial._add_prompt(response.prompt)
    for output in response.outputs:
        partial._add_output(output)
    partial._complete(response.summary)
    return partial.result


def tokens(response: pb.TokenizeResponse) -> tuple[Token, ...]:
    return tuple(Token(token.token_id, token.token_bytes) for token in response.tokens)


def model_info(response: pb.GetModelInfoResponse) -> ModelInfo:
    defaults = response.defaults
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
        defaults=GenerationDefaults(
            temperature=defaults.temperature,
            top_k=defaults.top_k,
            top_p=defaults.top_p,
            min_p=defaults.min_p,
            typical_p=defaults.typical_p,
            repetition_penalty=defaults.repetition_penalty,
            max_new_tokens=defaults.max_new_tokens,
        ),
    )


def server_info(response: pb.GetServerInfoResponse) -> ServerInfo:
    limits = response.limits
    return ServerInfo(
        version=response.version,
        uptime=_seconds(response.uptime),
        limits=Limits(
            max_running_requests=limits.max_running_requests,
            max_waiting_requests=limits.max_waiting_requests,
            max_step_tokens=limits.max_step_tokens,
            max_message_bytes=limits.max_message_bytes,
            max_cache_tokens=limits.max_cache_tokens,
            max_counts=dict(limits.max_counts),
            max_bytes=dict(limits.max_bytes),
        ),
        load=load(response.load),
        fingerprint=response.fingerprint,
    )


def load(message: pb.Load) -> Load:
    return Load(
        num_running_requests=message.num_running_requests,
        num_waiting_requests=message.num_waiting_requests,
        num_blocks=message.num_blocks,
        num_free_blocks=message.num_free_blocks,
        num_steps=message.num_steps,
        num_output_tokens=message.num_output_tokens,
        num_batched_sequences=message.num_batched_sequences,
        num_preparing_requests=message.num_preparing_requests,
        num_draft_tokens=message.num_draft_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
    )


def usage(message: pb.Usage) -> Usage:
    return Usage(
        num_prompt_tokens=message.num_prompt_tokens,
        num_cached_tokens=message.num_cached_tokens,
        num_output_tokens=message.num_output_tokens,
        num_preemptions=message.num_preemptions,
    )


def timings(message: pb.Timings) -> Timings:
    return Timings(
        queue_time=_seconds(message.queue_time) if message.HasField("queue_time") else None,
        prefill_time=_seconds(message.prefill_time) if message.HasField("prefill_time") else None,
        decode_time=_seconds(message.decode_time) if message.HasField("decode_time") else None,
        time_to_first_token=(
            _seconds(message.time_to_first_token) if message.HasField("time_to_first_token") else None
        ),
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
        tool_calls=_tool_calls(part for delta in deltas for part in delta.tool_calls),
    )


def cancelled(outcomes: Sequence[pb.CancelResponse | BaseException]) -> tuple[str, ...]:
    """Returns the request IDs that any server cancelled. Raises the failure of one that is not merely unavailable."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    others = [failure for failure in failures if not isinstance(failure, UnavailableError)]
    if others or len(failures) == len(outcomes):
        raise (others or failures)[0]
    found = (outcome.request_ids for outcome in outcomes if not isinstance(outcome, BaseException))
    return tuple(dict.fromkeys(chain.from_iterable(found)))


def _tool_calls(parts: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """Returns the calls of which these are the parts."""
    calls: dict[int, ToolCall] = {}
    for part in parts:
        begun = calls.get(part.index, ToolCall(part.id, part.name, ""))
        calls[part.index] = replace(begun, arguments=begun.arguments + part.arguments)
    return tuple(calls.values())


def _logprob(message: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(
        token_id=message.token_id,
        token_bytes=message.token_bytes,
        logprob=message.logprob,
        rank=message.rank,
        top_logprobs=tuple(TopLogprob(top.token_id, top.token_bytes, top.logprob) for top in message.top_logprobs),
    )


def _finish(message: pb.Finish) -> Finish:
    return Finish(
        reason=FinishReason(message.reason),
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        stop_string=message.stop_string if message.HasField("stop_string") else None,
    )


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
