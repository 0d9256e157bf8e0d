"""The methods of `mpt.v1.TextGenerationService` and `mpt.v1alpha1.DebugService`.

Each translates its message into a value, calls the engine and translates the result back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias, TypeVar

import grpc
from opentelemetry.trace import set_span_in_context

from mpt_grpc import __version__
from mpt_grpc.caller import Role
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.fingerprint import differences
from mpt_grpc.engine.load import LoadedModel
from mpt_grpc.engine.state import EngineState
from mpt_grpc.engine.stream import AsyncStream
from mpt_grpc.errors import FieldViolation, FingerprintError, InvalidRequestError, UnavailableError, UnknownModelError
from mpt_grpc.limits import (
    MAX_BYTES,
    MAX_CANCELLED,
    MAX_COUNTS,
    MAX_RETURNED_TOKENS,
    MAX_TOKEN_IDS,
    MAX_TOKENIZED_CHARACTERS,
)
from mpt_grpc.request import GenerationRequest
from mpt_grpc.results import OutputDelta
from mpt_grpc.server import convert
from mpt_grpc.server.answer import Answer
from mpt_grpc.server.call import Call, current_call
from mpt_grpc.server.message_work import MessageWork
from mpt_grpc.server.quotas import Quotas
from mpt_grpc.server.requests import generation_request
from mpt_grpc.server.sizes import MessageLimits, check_sizes
from mpt_grpc.server.text_work import TextWork
from mpt_grpc.settings import SchedulerSettings
from mpt_grpc.telemetry import names
from mpt_grpc.telemetry.tracing import operation, request_attributes
from mpt_grpc.text.tokenizer import QUICK_SIZE, encodes_quickly
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1 import text_generation_pb2_grpc as pb_grpc
from mpt_grpc_client.proto.v1alpha1 import debug_pb2, debug_pb2_grpc

_MANY_TO_CONVERT = 32
"""The number of log probabilities, with alternatives, that are converted in a millisecond."""
_Message = TypeVar("_Message")
_CallContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class TextGenerationServicer(pb_grpc.TextGenerationServiceServicer):
    """Serves text generation with one engine."""

    def __init__(
        self,
        engine: Engine,
        model: LoadedModel,
        scheduling: SchedulerSettings,
        limits: MessageLimits,
        messages: MessageWork,
    ) -> None:
        self._engine, self._model, self._scheduling = engine, model, scheduling
        self._message_limits, self._messages = limits, messages
        self._started_s = time.monotonic()
        self._num_answers = 0
        self._quotas, self._texts = Quotas(), TextWork()
        self._calls: dict[str, Call] = {}
        """The generations in progress, by request ID."""
        self.idle = asyncio.Event()
        """Set while no generation is in progress, which a drain waits for."""
        self.idle.set()

    async def Generate(self, request: pb.GenerateRequest, context: _CallContext) -> pb.GenerateResponse:
        async with self._answer(request, context) as answer:
            deltas, num_logprobs = list[OutputDelta](), 0
            async for delta in answer.deltas:
                deltas.append(delta)
                num_logprobs += _num_logprobs(delta)
            return await _built(partial(_complete, answer, deltas), num_logprobs)

    async def StreamGenerate(
        self,
        request: pb.GenerateRequest,
        context: _CallContext,
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        async with self._answer(request, context) as answer:
            is_first = True
            try:
                async for delta in answer.deltas:
                    yield await _built(partial(answer.part, delta, is_first=is_first), _num_logprobs(delta))
                    is_first = False
            except UnavailableError:
                if not is_first:
                    current_call().error_details.append(answer.resume_info())
                raise

    async def Tokenize(self, request: pb.TokenizeRequest, context: _CallContext) -> pb.TokenizeResponse:
        if len(request.text) > MAX_TOKENIZED_CHARACTERS:
            why = f"{len(request.text)} characters; at most {MAX_TOKENIZED_CHARACTERS} are allowed"
            raise InvalidRequestError(FieldViolation("text", why))
        return await self._texts.run(partial(self._tokens, request.text), is_quick=encodes_quickly(request.text))

    def _tokens(self, text: str) -> pb.TokenizeResponse:
        tokenizer = self._engine.preparation.tokenizer
        token_ids = tokenizer.encode(text)
        if len(token_ids) > MAX_RETURNED_TOKENS:
            why = f"{len(token_ids)} tokens; at most {MAX_RETURNED_TOKENS} are returned: shorten it"
            raise InvalidRequestError(FieldViolation("text", why))
        return convert.tokens(tokenizer, token_ids)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: _CallContext) -> pb.DetokenizeResponse:
        if len(request.token_ids) > MAX_TOKEN_IDS:
            why = f"{len(request.token_ids)} items; at most {MAX_TOKEN_IDS} are allowed"
            raise InvalidRequestError(FieldViolation("token_ids", why))
        return await self._texts.run(partial(self._text, request), is_quick=len(request.token_ids) <= QUICK_SIZE)

    def _text(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        tokenizer = self._engine.preparation.tokenizer
        for index, token in enumerate(request.token_ids):
            if token >= tokenizer.num_ids:
                why = f"{token} is not a token ID: IDs are below {tokenizer.num_ids}"
                raise InvalidRequestError(FieldViolation(f"token_ids[{index}]", why))
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=tokenizer.decode(request.token_ids, skip))

    async def Cancel(self, request: pb.CancelRequest, context: _CallContext) -> pb.CancelResponse:
        if len(request.request_ids) > MAX_CANCELLED:
            why = f"{len(request.request_ids)} items; at most {MAX_CANCELLED} are allowed"
            raise InvalidRequestError(FieldViolation("request_ids", why))
        return pb.CancelResponse(
            request_ids=[i for i in request.request_ids if self._may_cancel(i) and self._engine.cancel(i)]
        )

    def _may_cancel(self, request_id: str) -> bool:
        caller, call = current_call().caller, self._calls.get(request_id)
        return call is not None and (Role.ADMIN in caller.roles or call.caller.name == caller.name)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: _CallContext) -> pb.GetModelInfoResponse:
        return convert.model_info(self._model, self._engine.preparation)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: _CallContext) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(
            version=__version__,
            uptime=convert.duration(time.monotonic() - self._started_s),
            limits=pb.Limits(
                max_running_requests=self._scheduling.max_running_requests,
                max_waiting_requests=self._scheduling.max_waiting_requests,
                max_step_tokens=self._scheduling.max_step_tokens,
                max_message_bytes=self._message_limits.max_generate_bytes,
                max_cache_tokens=self._model.cache_tokens,
                max_counts=MAX_COUNTS,
                max_bytes=MAX_BYTES,
            ),
            load=convert.load(self._engine.load, self._model.num_blocks),
            fingerprint=self._model.fingerprint,
        )

    @asynccontextmanager
    async def _answer(self, message: pb.GenerateRequest, context: _CallContext) -> AsyncIterator[Answer]:
        """Submits a request, which ends with the block: by return, error, cancellation or deadline."""
        self._num_answers += 1
        self.idle.clear()
        call = current_call()
        try:
            with self._quotas.request(call.caller) as meter:
                stream = await self._submit(message, context)
                self._calls[stream.request_id] = call
                deltas = aiter(stream) if meter is None else meter.metered(stream)
                try:
                    tokenizer = self._engine.preparation.tokenizer
                    yield Answer(stream, deltas, message.output_options, tokenizer, self._model.fingerprint)
                finally:
                    _note_outputs(call, stream)
                    stream.cancel()
                    if self._calls.get(stream.request_id) is call:  # a new request may have the same ID
                        del self._calls[stream.request_id]
        finally:
            self._num_answers -= 1
            if not self._num_answers:
                self.idle.set()

    async def _submit(self, message: pb.GenerateRequest, context: _CallContext) -> AsyncStream:
        call = current_call()
        request = await self._messages.run(lambda: self._request(message, call), call.num_bytes)
        call.operation = operation(request)
        span, parent = call.span, None
        if span is not None:
            span.set_attributes(request_attributes(request, self._model.name))
            parent = set_span_in_context(span)
        stream = self._engine.submit(request, AsyncStream, context=parent, timeout_s=context.time_remaining())
        call.num_outputs = len(request.outputs)
        return stream

    def _request(self, message: pb.GenerateRequest, call: Call) -> GenerationRequest:
        """Returns the request of a message. Takes the longer the larger the message is."""
        if message.request_id:
            call.logged["request_id"] = message.request_id[: MAX_BYTES["request_id"]]
        if message.model not in ("", self._model.name):
            wanted = message.model[: MAX_BYTES["model"]]
            raise UnknownModelError(f"model {wanted!r} is not loaded; the loaded model is {self._model.name!r}")
        check_sizes(message, self._engine.preparation.limits)
        if message.resume_fingerprint not in ("", fingerprint := self._model.fingerprint):
            differing = ", ".join(differences(fingerprint, message.resume_fingerprint))
            why = f"this server differs from the one that began the output in {differing or 'its fingerprint'}"
            raise FingerprintError(f"{why}: its tokens might not be the same")
        request = generation_request(message, self._model.defaults, call.caller)
        call.logged["request_id"] = request.request_id
        return request


class DebugServicer(debug_pb2_grpc.DebugServiceServicer):
    """Shows the state of one engine."""

    def __init__(self, engine: Engine, model: LoadedModel) -> None:
        self._engine, self._model = engine, model
        self._last: tuple[EngineState, debug_pb2.GetEngineStateResponse] | None = None
        self._num_asking = 0

    async def GetEngineState(
        self, request: debug_pb2.GetEngineStateRequest, context: _CallContext
    ) -> debug_pb2.GetEngineStateResponse:
        self._num_asking += 1
        try:
            state = await asyncio.wrap_future(self._engine.state())
            # All who ask during one step get the same state, which takes milliseconds to convert.
            if self._last is None or self._last[0] is not state:
                self._last = state, convert.engine_state(state, self._model.num_blocks)
            return self._last[1]
        finally:
            self._num_asking -= 1
            if not self._num_asking:
                self._last = None


def _complete(answer: Answer, deltas: list[OutputDelta]) -> pb.GenerateResponse:
    """Returns the response, and frees the deltas one by one: freeing all at once would stop all threads."""
    response = answer.complete(deltas)
    while deltas:
        deltas.pop()
    return response


async def _built(build: Callable[[], _Message], num_logprobs: int) -> _Message:
    """Returns the message that `build` makes, in a thread if it has so many log probabilities that this takes long."""
    current_call().num_logprobs = num_logprobs
    return await asyncio.to_thread(build) if num_logprobs > _MANY_TO_CONVERT else build()


def _num_logprobs(delta: OutputDelta) -> int:
    return len(delta.logprobs) + len(delta.prompt_logprobs)


def _note_outputs(call: Call, stream: AsyncStream) -> None:
    """Adds what the caller has got to the call, however it ends."""
    call.finish_reasons = [finish.reason for finish in stream.finishes]
    prompt_tokens, output_tokens = stream.num_prompt_tokens, stream.num_output_tokens
    if not prompt_tokens:  # it ended before it was tokenized
        return
    call.logged |= {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    if call.span is not None:
        call.span.set_attributes({names.USAGE_INPUT_TOKENS: prompt_tokens, names.USAGE_OUTPUT_TOKENS: output_tokens})
