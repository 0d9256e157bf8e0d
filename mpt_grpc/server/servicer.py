"""The methods of `mpt.v1.TextGenerationService`: each turns its message into a value, asks the engine, answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
from opentelemetry.trace import format_trace_id, set_span_in_context

from mpt.v1 import text_generation_pb2 as pb
from mpt.v1 import text_generation_pb2_grpc as pb_grpc
from mpt_grpc import __version__
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.load import LoadedModel
from mpt_grpc.engine.stream import AsyncStream
from mpt_grpc.errors import FieldViolation, InvalidRequestError, UnknownModelError
from mpt_grpc.request import Finish, OutputDelta, RequestStats
from mpt_grpc.server import convert
from mpt_grpc.server.interceptors import current_span
from mpt_grpc.settings import SchedulerSettings
from mpt_grpc.telemetry import names
from mpt_grpc.telemetry.tracing import request_attributes

_MAX_ABORT_IDS = 1000
_MAX_TOKENIZE_CHARACTERS = 1 << 20
_MAX_DETOKENIZE_IDS = 1 << 18
# Longer texts are tokenized beside the event loop, which would otherwise stand still for a millisecond or more.
_LONG_TEXT = 4096

_CallContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class TextGenerationServicer(pb_grpc.TextGenerationServiceServicer):
    """Serves one engine."""

    def __init__(
        self, engine: Engine, model: LoadedModel, scheduling: SchedulerSettings, max_message_bytes: int
    ) -> None:
        self._engine, self._model, self._scheduling = engine, model, scheduling
        self._max_message_bytes = max_message_bytes
        self._started_s = time.monotonic()
        self._num_generations = 0
        self.idle = asyncio.Event()
        """Set while no generation is being answered; what a drain waits for."""
        self.idle.set()

    async def Generate(self, request: pb.GenerateRequest, context: _CallContext) -> pb.GenerateResponse:
        async with self._generation(request) as generation:
            deltas = [delta async for delta in generation.deltas()]
            return pb.GenerateResponse(
                request_id=generation.request_id,
                prompt=generation.prompt(),
                output=generation.output(
                    "".join(delta.text for delta in deltas),
                    tuple(token for delta in deltas for token in delta.token_ids),
                    deltas[-1].finish,
                ),
                summary=generation.summary(),
            )

    async def StreamGenerate(
        self,
        request: pb.GenerateRequest,
        context: _CallContext,
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        async with self._generation(request) as generation:
            prompt: pb.PromptInfo | None = generation.prompt()
            async for delta in generation.deltas():
                yield pb.StreamGenerateResponse(
                    request_id=generation.request_id,
                    prompt=prompt,
                    output=generation.output(delta.text, delta.token_ids, delta.finish),
                    summary=generation.summary(),
                )
                prompt = None

    async def Tokenize(self, request: pb.TokenizeRequest, context: _CallContext) -> pb.TokenizeResponse:
        if len(request.text) > _MAX_TOKENIZE_CHARACTERS:
            why = f"{len(request.text)} characters, at most {_MAX_TOKENIZE_CHARACTERS}"
            raise InvalidRequestError(FieldViolation("text", why))
        return await asyncio.to_thread(convert.tokens, self._engine.tokenizer, request.text)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: _CallContext) -> pb.DetokenizeResponse:
        tokenizer = self._engine.tokenizer
        if len(request.ids) > _MAX_DETOKENIZE_IDS:
            why = f"{len(request.ids)} ids, at most {_MAX_DETOKENIZE_IDS}"
            raise InvalidRequestError(FieldViolation("ids", why))
        for index, token in enumerate(request.ids):
            if token >= tokenizer.vocab_size:
                why = f"{token} is not a token id: they are below {tokenizer.vocab_size}"
                raise InvalidRequestError(FieldViolation(f"ids[{index}]", why))
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=await asyncio.to_thread(tokenizer.decode, request.ids, skip))

    async def Abort(self, request: pb.AbortRequest, context: _CallContext) -> pb.AbortResponse:
        if len(request.request_ids) > _MAX_ABORT_IDS:
            why = f"{len(request.request_ids)} ids, at most {_MAX_ABORT_IDS}"
            raise InvalidRequestError(FieldViolation("request_ids", why))
        return pb.AbortResponse(request_ids=[i for i in request.request_ids if self._engine.abort(i)])

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: _CallContext) -> pb.GetModelInfoResponse:
        return convert.model_info(self._model, self._engine.limits, self._engine.tokenizer.eos_token_ids)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: _CallContext) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(
            version=__version__,
            uptime=convert.duration(time.monotonic() - self._started_s),
            limits=pb.Limits(
                max_running_requests=self._scheduling.max_running_requests,
                max_waiting_requests=self._scheduling.max_waiting_requests,
                max_step_tokens=self._scheduling.max_step_tokens,
                max_message_bytes=self._max_message_bytes,
                cache_tokens=self._model.cache_tokens,
            ),
            load=convert.load(self._engine.load, self._model.num_blocks),
        )

    @asynccontextmanager
    async def _generation(self, message: pb.GenerateRequest) -> AsyncIterator[_Generation]:
        """A request in flight. However the block is left, by return, error, cancel or deadline, the request ends."""
        self._num_generations += 1
        self.idle.clear()
        try:
            stream = await self._submit(message)
            try:
                yield _Generation(stream, message.response)
            finally:
                stream.cancel()
        finally:
            self._num_generations -= 1
            if not self._num_generations:
                self.idle.set()

    async def _submit(self, message: pb.GenerateRequest) -> AsyncStream:
        if message.model not in ("", self._model.name):
            raise UnknownModelError(f"model {message.model!r} is not loaded; this server has {self._model.name!r}")
        request = convert.generation_request(message)
        span = current_span()
        parent = None
        if span is not None:
            span.set_attributes(request_attributes(request, self._model.name))
            parent = set_span_in_context(span)
        prompt_token_ids = None
        if isinstance(request.prompt, str) and len(request.prompt) > _LONG_TEXT:
            prompt_token_ids = await asyncio.to_thread(self._engine.tokenize_prompt, request)
        return self._engine.submit(request, AsyncStream, prompt_token_ids=prompt_token_ids, context=parent)


class _Generation:
    """The answer to one request while it comes: counts tokens, and ends with the account."""

    def __init__(self, stream: AsyncStream, options: pb.ResponseOptions) -> None:
        self.request_id = stream.request.request_id
        self._stream, self._options = stream, options
        self._num_tokens = 0
        self._stats: RequestStats | None = None

    async def deltas(self) -> AsyncIterator[OutputDelta]:
        async for delta in self._stream:
            self._num_tokens += len(delta.token_ids)
            self._stats = delta.stats
            if delta.finish is not None:
                self._describe(delta.finish)
            yield delta

    def prompt(self) -> pb.PromptInfo:
        return convert.prompt_info(self._stream.prompt_token_ids, self._options)

    def output(self, text: str, token_ids: tuple[int, ...], finish: Finish | None) -> pb.Output:
        return convert.output(text, token_ids, finish, self._options)

    def summary(self) -> pb.Summary | None:
        """None until the output has ended."""
        if self._stats is None:
            return None
        span = current_span()
        trace_id = "" if span is None else format_trace_id(span.get_span_context().trace_id)
        return convert.summary(self._stats, self._num_tokens, trace_id)

    def _describe(self, finish: Finish) -> None:
        if (span := current_span()) is not None:
            span.set_attributes(
                {
                    names.RESPONSE_FINISH_REASONS: [finish.reason.name.lower()],
                    names.USAGE_INPUT_TOKENS: len(self._stream.prompt_token_ids),
                    names.USAGE_OUTPUT_TOKENS: self._num_tokens,
                }
            )
