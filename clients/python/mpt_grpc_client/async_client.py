"""The asyncio client: `AsyncClient` and `AsyncTextStream`, the equivalents of `client.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from copy import copy
from typing import Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from mpt_grpc_client import debug, responses
from mpt_grpc_client.channel import ConnectionOptions, Endpoint, check_timeout, proxy_variable, resolve, trace_metadata
from mpt_grpc_client.errors import closed_error, from_rpc_error
from mpt_grpc_client.prompts import Prompt
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub
from mpt_grpc_client.proto.v1alpha1 import debug_pb2
from mpt_grpc_client.proto.v1alpha1.debug_pb2_grpc import DebugServiceStub
from mpt_grpc_client.request import GenerateOptions, build_request
from mpt_grpc_client.results import Delta, Generation, ModelInfo, ServerInfo, Token

_LARGE_BYTES = 32 << 10
"""Messages up to this size are converted in less than a millisecond."""
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Message = TypeVar("_Message", bound=Message)
_Result = TypeVar("_Result")


class AsyncClient:
    """A connection to a server for the tasks of one event loop. Every call that fails raises `MptGrpcError`.

    Cancelling a task that awaits a call cancels the call on the server.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float | None = None,
        retries: bool = True,
        channel: grpc.aio.Channel | None = None,
        **connection: Unpack[ConnectionOptions],
    ) -> None:
        """Creates a client, which connects at its first call, and from then on belongs to that event loop.

        target: `host:port`, `grpcs://host:port` with TLS, or `unix:path`; defaults to the environment variable
            MPT_GRPC_TARGET, then to `localhost:50051`.
        timeout: the default timeout of calls in seconds, including retries; None waits indefinitely.
        retries: whether to retry calls up to three times while the server is unavailable or overloaded.
        channel: a channel to the target instead of the client's own; it has its own options, so `retries` and those of
            the connection have no effect. The client closes it.
        connection: see `ConnectionOptions`.
        """
        endpoint = resolve(target, connection, has_channel=channel is not None)
        self._target, self._timeout = endpoint.target, check_timeout(timeout)
        self._metadata = endpoint.metadata
        self._connection = _Connection(endpoint, retries, channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels the calls in progress and disconnects."""
        await self._connection.close()

    def with_metadata(self, *metadata: tuple[str, str]) -> Self:
        """Returns a client whose calls also send this metadata, on the connection of this client."""
        client = copy(self)
        client._metadata = (*self._metadata, *metadata)
        return client

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Generates a continuation of the prompt and returns it when it is complete.

        timeout: the timeout of the call in seconds; None uses the client's. After `time_limit`, by contrast, the call
        returns its partial output.
        options: see `GenerateOptions`.
        """
        request = build_request(prompt, **options)
        response = await self._call(self._connection.stubs.service.Generate, request, timeout)
        return await _converted(responses.generation, response)

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncTextStream:
        """Generates a continuation of the prompt and streams it. The request is sent immediately.

        timeout: the timeout of the whole stream in seconds; None uses the client's.
        options: see `GenerateOptions`.
        """
        request = build_request(prompt, **options)
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        call = self._connection.stubs.service.StreamGenerate(
            request, timeout=timeout, metadata=trace_metadata() + self._metadata
        )
        return AsyncTextStream(call, request.sampling.num_sequences, self._target, timeout)

    async def tokenize(self, text: str, *, timeout: float | None = None) -> tuple[Token, ...]:
        """Returns the tokens of a text."""
        request = pb.TokenizeRequest(text=text)
        return await _converted(
            responses.tokens, await self._call(self._connection.stubs.service.Tokenize, request, timeout)
        )

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        """Returns the text of token IDs. Invalid UTF-8 is replaced by U+FFFD."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._call(self._connection.stubs.service.Detokenize, request, timeout)).text

    async def cancel(self, *request_ids: str, timeout: float | None = None) -> tuple[str, ...]:
        """Cancels requests of this or, with the role `admin`, any caller. Their calls return their partial output.

        Returns the IDs that were in progress.
        """
        request = pb.CancelRequest(request_ids=request_ids)
        return tuple((await self._call(self._connection.stubs.service.Cancel, request, timeout)).request_ids)

    async def get_model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """Returns information about the loaded model."""
        request = pb.GetModelInfoRequest()
        return responses.model_info(await self._call(self._connection.stubs.service.GetModelInfo, request, timeout))

    async def get_server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns the server's version, limits and load."""
        request = pb.GetServerInfoRequest()
        return responses.server_info(await self._call(self._connection.stubs.service.GetServerInfo, request, timeout))

    async def get_engine_state(self, *, timeout: float | None = None) -> debug.EngineState:
        """Returns the requests in progress and the KV cache blocks they hold. It may change in any release."""
        request = debug_pb2.GetEngineStateRequest()
        return debug.engine_state(
            await self._call(self._connection.stubs.debug_service.GetEngineState, request, timeout)
        )

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout: float | None
    ) -> _Response:
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        try:
            return await method(request, timeout=timeout, metadata=trace_metadata() + self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target, timeout, proxy_variable(self._target)) from error
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            raise closed_error() from error


class _Connection:
    """A channel, which several clients of one event loop may share."""

    def __init__(self, endpoint: Endpoint, retries: bool, channel: grpc.aio.Channel | None) -> None:
        self._endpoint, self._retries, self._channel = endpoint, retries, channel
        self._stubs: _Stubs | None = None
        self._is_closed = False

    @property
    def stubs(self) -> _Stubs:
        """The methods. Raises MptGrpcError once the client is closed, and RuntimeError outside its event loop."""
        if self._is_closed:
            raise closed_error()
        if self._stubs is None:
            # Made now: grpc.aio hangs if a channel is created before its loop runs.
            self._channel = self._channel or self._endpoint.aio_channel(self._retries)
            self._stubs = _Stubs(self._channel)
        if self._stubs.loop is not asyncio.get_running_loop():
            raise RuntimeError(
                "this AsyncClient is in use by another event loop; create one client for each event loop"
            )
        return self._stubs

    async def close(self) -> None:
        self._is_closed = True
        if self._channel is not None:
            await self._channel.close()


class _Stubs:
    """The methods of a server, for the running event loop."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.loop = asyncio.get_running_loop()
        self.service = TextGenerationServiceStub(channel)
        self.debug_service = DebugServiceStub(channel)


class AsyncTextStream(responses.PartialGeneration):
    """A generation in progress. Iterate over it for its text, or over `deltas()` for everything, once.

    As a context manager, it cancels the generation on the server when the block is left before the end.
    """

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.StreamGenerateResponse],
        num_sequences: int,
        target: str,
        timeout: float | None,
    ) -> None:
        super().__init__()
        self._call, self._num_sequences, self._target, self._timeout = call, num_sequences, target, timeout
        self._cancelled = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """Returns the next piece of text, which is never empty.

        Raises TypeError if several outputs were requested, and otherwise the same as `deltas`.
        """
        if self._num_sequences > 1:
            raise TypeError("the outputs are interleaved; iterate over deltas() instead")
        while (delta := await self._next_delta()) is not None:
            if delta.text:
                return delta.text
        raise StopAsyncIteration

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yields the new parts of all outputs. Raises `MptGrpcError` if the call fails; ends when it is cancelled."""
        while (delta := await self._next_delta()) is not None:
            yield delta

    def cancel(self) -> None:
        """Cancels the generation on the server. Has no effect once it has ended."""
        self._cancelled = True
        self._call.cancel()

    async def _next_delta(self) -> Delta | None:
        try:
            chunk = await anext(aiter(self._call), None)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target, self._timeout, proxy_variable(self._target)) from error
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            if self._cancelled:
                return None
            raise closed_error() from error
        return None if chunk is None else await _converted(self._add, chunk)


async def _converted(convert: Callable[[_Message], _Result], message: _Message) -> _Result:
    """Returns the converted message; large ones are converted in a thread, so as not to block the event loop."""
    if message.ByteSize() > _LARGE_BYTES:
        return await asyncio.to_thread(convert, message)
    return convert(message)


def _is_cancelled() -> bool:
    """Whether the task itself is cancelled; grpc.aio raises the same error for a call or channel closed by us."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
