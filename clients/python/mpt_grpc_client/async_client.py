"""The asyncio client: `AsyncClient` and `AsyncTextStream`, the equivalents of `client.py`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from copy import copy
from typing import Self, TypeAlias, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from mpt_grpc_client import debug, responses
from mpt_grpc_client.channel import ConnectionOptions, Endpoint, check_timeout, is_balanced, resolve, trace_metadata
from mpt_grpc_client.continuation import UNSEEN_CHUNK_TOKENS, Continuation
from mpt_grpc_client.errors import MptGrpcError, UnavailableError, closed_error
from mpt_grpc_client.failover import Attempts, Rotation, Server
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
_StreamCall: TypeAlias = "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.StreamGenerateResponse]"


class AsyncClient:
    """A connection to one server or several for the tasks of one event loop; see `Client`.

    Every call that fails raises `MptGrpcError`. Cancelling a task that awaits a call cancels the call on the server.
    """

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
        *,
        timeout: float | None = None,
        retries: bool = True,
        resume_inexact: bool = False,
        channel: grpc.aio.Channel | None = None,
        **connection: Unpack[ConnectionOptions],
    ) -> None:
        """Creates a client, which connects at its first call, and from then on belongs to that event loop.

        target: `host:port`, `grpcs://host:port` with TLS, or `unix:path`; defaults to the environment variable
            MPT_GRPC_TARGET, then to `localhost:50051`. Several are a list, or separated by commas; `dns:///host:port`
            stands for all addresses of the host.
        timeout: the default timeout of calls in seconds, including retries; None waits indefinitely.
        retries: whether to retry calls up to three times while all servers are unavailable or overloaded.
        resume_inexact: whether a server with another fingerprint may continue a generation.
        channel: a channel to the target instead of the client's own; it has its own options, so `retries` and those of
            the connection have no effect. The client closes it.
        connection: see `ConnectionOptions`.
        """
        endpoints = resolve(target, connection, has_channel=channel is not None)
        self._timeout, self._metadata = check_timeout(timeout), endpoints[0].metadata
        self._retries, self._resume_inexact = retries, resume_inexact
        self._connections = _Connections(endpoints, retries, channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels the calls in progress and disconnects."""
        await self._connections.close()

    def with_metadata(self, *metadata: tuple[str, str]) -> Self:
        """Returns a client whose calls also send this metadata, on the connections of this client."""
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
        if not self._connections.is_balanced:
            response = await self._call(lambda connection: connection.service.Generate, request, timeout)
            return await _converted(responses.generation, response)
        request.output_options.chunk_tokens = UNSEEN_CHUNK_TOKENS
        async with self._stream(request, timeout) as stream:
            async for _ in stream.deltas():
                pass
        return stream.result

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncTextStream:
        """Generates a continuation of the prompt and streams it. The request is sent immediately.

        timeout: the timeout of the whole stream in seconds; None uses the client's.
        options: see `GenerateOptions`.
        """
        return self._stream(build_request(prompt, **options), timeout)

    async def tokenize(self, text: str, *, timeout: float | None = None) -> tuple[Token, ...]:
        """Returns the tokens of a text."""
        request = pb.TokenizeRequest(text=text)
        return await _converted(responses.tokens, await self._call(lambda c: c.service.Tokenize, request, timeout))

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        """Returns the text of token IDs. Invalid UTF-8 is replaced by U+FFFD."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._call(lambda c: c.service.Detokenize, request, timeout)).text

    async def cancel(self, *request_ids: str, timeout: float | None = None) -> tuple[str, ...]:
        """Cancels requests of this or, with the role `admin`, any caller. Their calls return their partial output.

        Returns the IDs that were in progress. Of several servers, those that are unavailable are skipped.
        """
        request = pb.CancelRequest(request_ids=request_ids)
        async with self._connections.each_server() as servers:
            calls = (self._call(lambda c: c.service.Cancel, request, timeout, server) for server in servers)
            results = await asyncio.gather(*calls, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        others = [failure for failure in failures if not isinstance(failure, UnavailableError)]
        if others or len(failures) == len(servers):
            raise (others or failures)[0]
        found = (result.request_ids for result in results if not isinstance(result, BaseException))
        return tuple(dict.fromkeys(itertools.chain.from_iterable(found)))

    async def get_model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """Returns information about the loaded model."""
        request = pb.GetModelInfoRequest()
        return responses.model_info(await self._call(lambda c: c.service.GetModelInfo, request, timeout))

    async def get_server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns the server's version, limits and load."""
        request = pb.GetServerInfoRequest()
        return responses.server_info(await self._call(lambda c: c.service.GetServerInfo, request, timeout))

    async def get_engine_state(self, *, timeout: float | None = None) -> debug.EngineState:
        """Returns the requests in progress and the KV cache blocks they hold. It may change in any release."""
        request = debug_pb2.GetEngineStateRequest()
        return debug.engine_state(await self._call(lambda c: c.debug_service.GetEngineState, request, timeout))

    async def _call(
        self,
        method: Callable[[_Connection], grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]],
        request: _Request,
        timeout: float | None,
        server: Server[_Connection] | None = None,
    ) -> _Response:
        """Calls the given server, or the next one in turn that responds."""
        attempts = self._attempts(timeout, server)
        while True:
            self._connections.check_open()
            connection = attempts.server.connection
            try:
                response = await method(connection)(
                    request, timeout=attempts.timeout, metadata=trace_metadata() + self._metadata
                )
            except grpc.RpcError as error:
                pause = attempts.after(attempts.translated(error))
                if isinstance(pause, MptGrpcError):
                    raise pause from error
                await asyncio.sleep(pause)
            except asyncio.CancelledError as error:
                if _is_cancelled():
                    raise
                raise closed_error() from error
            else:
                attempts.succeeded()
                return response

    def _stream(self, request: pb.GenerateRequest, timeout: float | None) -> AsyncTextStream:
        metadata = trace_metadata() + self._metadata

        def call(server: Server[_Connection], timeout: float | None) -> _StreamCall:
            self._connections.check_open()
            wanted = request if continuation is None else continuation.request()
            return server.connection.service.StreamGenerate(wanted, timeout=timeout, metadata=metadata)

        continuation = (
            Continuation(request, resume_inexact=self._resume_inexact) if self._connections.is_balanced else None
        )
        return AsyncTextStream(call, request.sampling.num_sequences, self._attempts(timeout), continuation)

    def _attempts(self, timeout: float | None, server: Server[_Connection] | None = None) -> Attempts[_Connection]:
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        rotation = self._connections.rotation if server is None else Rotation([server], is_balanced=False)
        return Attempts(rotation, timeout, retries=self._retries)


class _Connection:
    """A channel of the running event loop, and the services of its server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.service = TextGenerationServiceStub(channel)
        self.debug_service = DebugServiceStub(channel)


class _Connections:
    """The connections to the servers, which several clients of one event loop may share."""

    def __init__(self, endpoints: Sequence[Endpoint], retries: bool, channel: grpc.aio.Channel | None) -> None:
        self.is_balanced = is_balanced(endpoints, channel)
        self._endpoints, self._retries, self._channel = endpoints, retries, channel
        self._rotation: Rotation[_Connection] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    @property
    def rotation(self) -> Rotation[_Connection]:
        """The servers. Raises MptGrpcError once the client is closed, and RuntimeError outside its event loop."""
        self.check_open()
        loop = asyncio.get_running_loop()
        if self._rotation is None:
            # Made now: grpc.aio hangs if a channel is created before its loop runs.
            self._rotation, self._loop = (
                Rotation(map(self._server, self._endpoints), is_balanced=self.is_balanced),
                loop,
            )
        if self._loop is not loop:
            raise RuntimeError(
                "this AsyncClient is in use by another event loop; create one client for each event loop"
            )
        return self._rotation

    @asynccontextmanager
    async def each_server(self) -> AsyncIterator[Sequence[Server[_Connection]]]:
        """Yields all servers, each with a connection of its own: also those that drain, and the addresses of names."""
        if not self.is_balanced:
            yield self.rotation.servers
            return
        resolved = await asyncio.gather(*(asyncio.to_thread(endpoint.addresses) for endpoint in self._endpoints))
        async with AsyncExitStack() as stack:
            servers = []
            for address in itertools.chain.from_iterable(resolved):
                channel = address.aio_channel(False, balanced=True, checks_health=False)
                servers.append(Server(address.target, _Connection(await stack.enter_async_context(channel))))
            yield servers

    def check_open(self) -> None:
        """Raises MptGrpcError once the client is closed."""
        if self._is_closed:
            raise closed_error()

    async def close(self) -> None:
        self._is_closed = True
        channels = [self._channel]
        if self._rotation is not None:
            channels = [server.connection.channel for server in self._rotation.servers]
        await asyncio.gather(*(channel.close() for channel in channels if channel is not None))

    def _server(self, endpoint: Endpoint) -> Server[_Connection]:
        channel = self._channel or endpoint.aio_channel(self._retries, balanced=self.is_balanced)
        return Server(endpoint.target, _Connection(channel))


class AsyncTextStream(responses.PartialGeneration):
    """A generation in progress. Iterate over it for its text, or over `deltas()` for everything, once.

    As a context manager, it cancels the generation on the server when the block is left before the end.
    """

    def __init__(
        self,
        call: Callable[[Server[_Connection], float | None], _StreamCall],
        num_sequences: int,
        attempts: Attempts[_Connection],
        continuation: Continuation | None,
    ) -> None:
        """`call` starts the call of a server, with a timeout."""
        super().__init__()
        self._start_call, self._num_sequences, self._attempts = call, num_sequences, attempts
        self._continuation = continuation
        if continuation is not None:
            self._resumptions = continuation.resumptions
        self._cancelled = False
        self._call = call(attempts.server, attempts.timeout)

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
        continuation = self._continuation
        while True:
            try:
                chunk = await anext(aiter(self._call), None)
                if chunk is not None and continuation is not None:
                    chunk = continuation.receive(chunk, self._attempts.server.target)
            except grpc.RpcError as error:
                if continuation is not None and continuation.has_ended:
                    return None
                await self._go_on(self._attempts.translated(error), error)
            except UnavailableError as error:
                self._call.cancel()
                await self._go_on(error, error)
            except asyncio.CancelledError as error:
                if _is_cancelled():
                    raise
                if self._cancelled:
                    return None
                raise closed_error() from error
            else:
                if chunk is None:
                    return None
                self._attempts.succeeded(chunk.output.num_tokens)
                return await _converted(self._add, chunk)

    async def _go_on(self, failure: MptGrpcError, cause: Exception) -> None:
        """Calls the next server. Raises the failure if there is none."""
        pause = self._attempts.after(failure)
        if isinstance(pause, MptGrpcError):
            raise pause from cause
        await asyncio.sleep(pause)
        self._call = self._start_call(self._attempts.server, self._attempts.timeout)
        if self._cancelled:
            self._call.cancel()


async def _converted(convert: Callable[[_Message], _Result], message: _Message) -> _Result:
    """Returns the converted message; large ones are converted in a thread, so as not to block the event loop."""
    if message.ByteSize() > _LARGE_BYTES:
        return await asyncio.to_thread(convert, message)
    return convert(message)


def _is_cancelled() -> bool:
    """Whether the task itself is cancelled; grpc.aio raises the same error for a call or channel closed by us."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
