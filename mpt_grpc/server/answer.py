"""The response to one request: the messages of its outputs while they are generated, and their summary."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from opentelemetry.trace import format_trace_id

from mpt_grpc.engine.stream import AsyncStream, collect
from mpt_grpc.request import sequence_seed
from mpt_grpc.results import Output, OutputDelta, RequestStats, TokenLogprob
from mpt_grpc.server import convert
from mpt_grpc.server.call import current_call
from mpt_grpc.text.tokenizer import Tokenizer
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

_MAX_RESUME_INFO_TOKENS = 1000
"""They take at most half of the 8 KiB that gRPC allows for the metadata of a response."""


class Answer:
    """The response to one request while it is generated."""

    def __init__(
        self,
        stream: AsyncStream,
        deltas: AsyncIterator[OutputDelta],
        options: pb.OutputOptions,
        tokenizer: Tokenizer,
        fingerprint: str,
    ) -> None:
        self.request_id, self.deltas = stream.request_id, deltas
        self._stream = stream
        self._options, self._tokenizer = options, tokenizer
        self._returns_token_ids = options.return_token_ids
        self._fingerprint = fingerprint
        self._sent: dict[int, list[int]] = {}
        """The tokens that have been sent of the outputs that have begun and not ended, by their indices."""

    def complete(self, deltas: Sequence[OutputDelta]) -> pb.GenerateResponse:
        generation = collect(deltas)
        response = pb.GenerateResponse(request_id=self.request_id, summary=self._summary(generation.stats))
        self._fill_prompt(response.prompt, generation.prompt_logprobs)
        for index, output in zip(self._stream.prepared.request.outputs, generation.outputs, strict=True):
            message = response.outputs.add(index=index, text=output.text, num_tokens=len(output.token_ids))
            self._fill_output(message, output)
        return response

    def part(self, delta: OutputDelta, *, is_first: bool) -> pb.StreamGenerateResponse:
        output = pb.Output(index=delta.index, text=delta.text, num_tokens=len(delta.token_ids))
        self._fill_output(output, delta)
        response = pb.StreamGenerateResponse(request_id=self.request_id, output=output)
        if is_first:
            self._fill_prompt(response.prompt, delta.prompt_logprobs)
            response.fingerprint = self._fingerprint
            self._sent = {index: list(resumed) for index, resumed in self._stream.prepared.request.outputs.items()}
        self._sent[delta.index] += delta.token_ids
        if delta.finish is not None:
            del self._sent[delta.index]
        if delta.stats is not None:
            response.summary.CopyFrom(self._summary(delta.stats))
        return response

    def resume_info(self) -> pb.ResumeInfo:
        """Returns the information with which the stream can continue elsewhere, after its first part."""
        info = pb.ResumeInfo(seed=self._stream.prepared.request.sampling.seed or 0, fingerprint=self._fingerprint)
        if sum(map(len, self._sent.values())) <= _MAX_RESUME_INFO_TOKENS:
            info.outputs.extend(pb.PartialOutput(index=index, token_ids=ids) for index, ids in self._sent.items())
        return info

    def _fill_prompt(self, message: pb.PromptInfo, logprobs: Sequence[TokenLogprob]) -> None:
        token_ids = self._stream.prepared.prompt_token_ids
        message.num_tokens = len(token_ids)
        if self._options.return_prompt_token_ids:
            message.token_ids.extend(token_ids)
        convert.add_logprobs(message, logprobs, self._tokenizer)

    def _fill_output(self, message: pb.Output, output: OutputDelta | Output) -> None:
        """Adds to an output with its index and its text what else there is of it."""
        if self._returns_token_ids:
            message.token_ids.extend(output.token_ids)
        convert.add_logprobs(message, output.logprobs, self._tokenizer)
        if output.tool_calls:
            message.tool_calls.extend(convert.tool_calls(output.tool_calls))
        if output.finish is not None:
            message.finish.CopyFrom(convert.finish(output.finish))
            message.seed = sequence_seed(self._stream.prepared.request.sampling.seed or 0, message.index)

    def _summary(self, stats: RequestStats) -> pb.Summary:
        call = current_call()
        call.logged |= {
            "cached_tokens": stats.num_cached_tokens,
            "queue_s": _elapsed_s(stats.arrival_time_s, stats.scheduled_time_s),
            "first_token_s": _elapsed_s(stats.arrival_time_s, stats.first_token_time_s),
            "preemptions": stats.num_preemptions,
        }
        trace_id = "" if call.span is None else format_trace_id(call.span.get_span_context().trace_id)
        return convert.summary(stats, trace_id)


def _elapsed_s(start_s: float, end_s: float | None) -> float | None:
    return None if end_s is None else round(end_s - start_s, 6)
