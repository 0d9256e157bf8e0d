"""The asyncio client, `AsyncClient`, the equivalent of `client.py`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence, Sized
from copy import copy
from functools import partial
from typing import Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from mpt_grpc_client import debug, responses
from mpt_grpc_client.async_connections import AsyncConnections
from mpt_grpc_client.async_stream import (
    AsyncConnection,
    AsyncStreamCall,
    AsyncTextStream,
    converted,
    is_cancelled,
    wait,
)
from mpt_grpc_client.channel import ConnectionOptions, Endpoint, check_kind, check_timeout, resolve
from mpt_grpc_client.continuation import Continuation
from mpt_grpc_client.errors import MptGrpcError, closed_error
from mpt_grpc_client.failover import BEFORE_LOOKUP, Attempts
from mpt_grpc_client.options import GenerateOptions
from mpt_grpc_client.prompts import Prompt
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1alpha1 import debug_pb2
from mpt_grpc_client.purpose import Purpose
from mpt_grpc_client.request import (
    PreparedPrompt,
    cancel_request,
    detokenize_request,
    request_of,
    tokenize_request,
)
from mpt_grpc_client.results import Generation, Token
from mpt_grpc_client.rotation import Server
from mpt_grpc_client.server_info import ModelInfo, ServerInfo
from mpt_grpc_client.tracing import CallSpan

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response")


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
        retries: whether to retry calls up to three times while all servers are unavailable or overloaded. With several
            servers, a stream that has begun waits for busy ones in any case, until its timeout or for five minutes.
        resume_inexact: whether a server with another fingerprint may continue a generation.
        channel: a channel to the target instead of the client's own. Its credentials, options and interceptors are its
            own, and `retries` have no effect. The client closes it.
        connection: see `ConnectionOptions`.
        """
        check_kind(channel, connection, asynchronous=True)
        endpoints = resolve(target, connection, channel=channel)
        self._timeout, self._metadata = check_timeout(timeout), endpoints[0].metadata
        self._retries, self._resume_inexact = retries, resume_inexact
        self._connections = AsyncConnections(endpoints, retries, channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels the calls in progress and disconnects."""
        await self._connections.close()

    def with_metadata(self, *metadata: tuple[str, str | bytes]) -> Self:
        """Returns a client whose calls also send this metadata, on the connections of this client."""
        client = copy(self)
        client._metadata = self._metadata.and_(metadata)
        return client

    async def generate(
        self, prompt: Prompt | PreparedPrompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Generates a continuation of the prompt and returns it when it is complete.

        timeout: the timeout of the call in seconds; None uses the client's. After `time_limit`, by contrast, the call
        returns its partial output.
        options: see `GenerateOptions`. A `PreparedPrompt` has its own: any others beside it raise TypeError.
        """
        request = request_of(prompt, **options)
        if not self._connections.is_balanced:
            response = await self._call(lambda connection: connection.service.Generate, request, timeout)
            return await converted(
                responses.generation, response, responses.num_parts(response.prompt, *response.outputs)
            )
        async with self._stream(request, timeout, is_unseen=True) as stream:
            async for _ in stream.deltas():
                pass
        return stream.result

    def stream(
        self, prompt: Prompt | PreparedPrompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncTextStream:
        """Generates a continuation of the prompt and streams it. The request is sent immediately.

        timeout: the timeout of the whole stream in seconds; None uses the client's.
        options: see `GenerateOptions`. A `PreparedPrompt` has its own: any others beside it raise TypeError.
        """
        return self._stream(request_of(prompt, **options), timeout)

    async def tokenize(self, text: str, *, timeout: float | None = None) -> tuple[Token, ...]:
        """Returns the tokens of a text."""
        request = tokenize_request(text)
        response = await self._call(lambda c: c.service.Tokenize, request, timeout)
        return await converted(responses.tokens, response, len(response.tokens))

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        """Returns the text of token IDs. Invalid UTF-8 is replaced by U+FFFD."""
        build = partial(detokenize_request, skip_special_tokens=skip_special_tokens)
        request = await converted(build, token_ids, len(token_ids) if isinstance(token_ids, Sized) else 0)
        return (await self._call(lambda c: c.service.Detokenize, request, timeout)).text

    async def cancel(self, *request_ids: str, timeout: float | None = None) -> tuple[str, ...]:
        """Cancels requests of this or, with the role `admin`, any caller. Their calls return their partial output.

        Returns the IDs that were in progress. Of several servers, those that are unavailable are skipped.
        """
        request = cancel_request(request_ids)
        if not self._connections.is_balanced:
            response = await self._call(lambda c: c.service.Cancel, request, timeout)
            return responses.cancelled([response])
        attempts = self._attempts(timeout)

        async def cancel_at(address: Endpoint) -> pb.CancelResponse:
            # A connection of its own also reaches a server that drains, and each address of a name.
            async with address.aio_channel(Purpose.EVERY) as channel:
                attempt = attempts.at(Server(address.target, AsyncConnection(channel)))
                return await self._attempt(lambda c: c.service.Cancel, request, attempt)

        async def cancel_at_all(endpoint: Endpoint) -> list[pb.CancelResponse | BaseException]:
            try:
                addresses = await asyncio.wait_for(asyncio.wrap_future(endpoint.look_up()), attempts.timeout)
            except TimeoutError:
                return [attempts.expired(BEFORE_LOOKUP)]
            return await asyncio.gather(*map(cancel_at, addresses), return_exceptions=True)

        outcomes = await asyncio.gather(*map(cancel_at_all, self._connections.endpoints))
        return responses.cancelled(list(itertools.chain.from_iterable(outcomes)))

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
        response = await self._call(lambda c: c.debug_service.GetEngineState, request, timeout)
        return await converted(debug.engine_state, response, debug.num_parts(response))

    async def _call(
        self,
        method: Callable[[AsyncConnection], grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]],
        request: _Request,
        timeout: float | None,
    ) -> _Response:
        """Calls the next server in turn that responds."""
        return await self._attempt(method, request, self._attempts(timeout))

    async def _attempt(
        self,
        method: Callable[[AsyncConnection], grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]],
        request: _Request,
        attempts: Attempts[AsyncConnection],
    ) -> _Response:
        span = CallSpan(request)
        try:
            while True:
                self._connections.check_open()
                metadata = span.metadata() + self._metadata.current()
                try:
                    call = method(attempts.server.connection)
                    response = await call(request, timeout=attempts.timeout, metadata=metadata)
                except grpc.RpcError as error:
                    failure, failed = attempts.translated(error), attempts.server.target
                    pause = attempts.after(failure)
                    if isinstance(pause, MptGrpcError):
                        raise pause from error
                    span.add_attempt(failed, failure)
                    await wait(pause, attempts, asyncio.Event())
                except asyncio.CancelledError as error:
                    if is_cancelled():
                        raise
                    raise closed_error() from error
                else:
                    attempts.succeeded()
                    return response
        except BaseException as error:
            span.fail(error)
            raise
        finally:
            span.end()

    def _stream(
        self, request: pb.GenerateRequest, timeout: float | None, *, is_unseen: bool = False
    ) -> AsyncTextStream:
        attempts = self._attempts(timeout, request)
        span = CallSpan(request, streams=True, on_end=attempts.end)
        continuation = None
        if self._connections.is_balanced:
            continuation = Continuation(request, resume_inexact=self._resume_inexact, is_unseen=is_unseen)

        def call(server: Server[AsyncConnection], timeout: float | None) -> AsyncStreamCall:
            self._connections.check_open()
            wanted = request if continuation is None else continuation.request()
            metadata = span.metadata() + self._metadata.current()
            return server.connection.service.StreamGenerate(wanted, timeout=timeout, metadata=metadata)

        return AsyncTextStream(call, request.sampling.num_sequences, attempts, continuation, span)

    def _attempts(
        self, timeout: float | None, generation: pb.GenerateRequest | None = None
    ) -> Attempts[AsyncConnection]:
        owner = "client" if timeout is None else "call"
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        return Attempts(self._connections.rotation, timeout, retries=self._retries, owner=owner, generation=generation)
