"""The synchronous client, `Client`; `async_client.py` has its asyncio equivalent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from typing import Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from mpt_grpc_client import debug, responses
from mpt_grpc_client.channel import (
    ConnectionOptions,
    Endpoint,
    check_kind,
    check_timeout,
    is_balanced,
    look_up_all,
    resolve,
)
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
from mpt_grpc_client.rotation import Rotation, Server
from mpt_grpc_client.server_info import ModelInfo, ServerInfo
from mpt_grpc_client.stream import Connection, StreamCall, TextStream
from mpt_grpc_client.tracing import CallSpan

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response")


class Client:
    """A connection to one server or several, which threads may share. Every call that fails raises `MptGrpcError`.

    With several servers, calls are spread over them. If one fails, another continues what it has begun: its text and
    tokens are the same, provided that the fingerprints of the servers are.
    """

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
        *,
        timeout: float | None = None,
        retries: bool = True,
        resume_inexact: bool = False,
        channel: grpc.Channel | None = None,
        **connection: Unpack[ConnectionOptions],
    ) -> None:
        """Creates a client, which connects at its first call.

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
        check_kind(channel, connection, asynchronous=False)
        self._endpoints = endpoints = resolve(target, connection, channel=channel)
        self._timeout, self._metadata = check_timeout(timeout), endpoints[0].metadata
        self._retries, self._resume_inexact = retries, resume_inexact
        balanced = is_balanced(endpoints, channel)
        purpose = Purpose.of_calls(balanced=balanced, retries=retries)

        def server(endpoint: Endpoint) -> Server[Connection]:
            return Server(endpoint.target, Connection(channel or endpoint.channel(purpose)))

        self._rotation = Rotation(map(server, endpoints), is_balanced=balanced)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the calls in progress and disconnects."""
        self._rotation.close()
        for server in self._rotation.servers:
            server.connection.channel.close()

    def with_metadata(self, *metadata: tuple[str, str | bytes]) -> Self:
        """Returns a client whose calls also send this metadata, on the connections of this client."""
        client = copy(self)
        client._metadata = self._metadata.and_(metadata)
        return client

    def generate(
        self, prompt: Prompt | PreparedPrompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Generates a continuation of the prompt and returns it when it is complete.

        timeout: the timeout of the call in seconds; None uses the client's. After `time_limit`, by contrast, the call
        returns its partial output.
        options: see `GenerateOptions`. A `PreparedPrompt` has its own: any others beside it raise TypeError.
        """
        request = request_of(prompt, **options)
        if not self._rotation.is_balanced:
            return responses.generation(self._call(lambda connection: connection.service.Generate, request, timeout))
        with self._stream(request, timeout, is_unseen=True) as stream:
            for _ in stream.deltas():
                pass
        return stream.result

    def stream(
        self, prompt: Prompt | PreparedPrompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> TextStream:
        """Generates a continuation of the prompt and streams it. The request is sent immediately.

        timeout: the timeout of the whole stream in seconds; None uses the client's.
        options: see `GenerateOptions`. A `PreparedPrompt` has its own: any others beside it raise TypeError.
        """
        return self._stream(request_of(prompt, **options), timeout)

    def tokenize(self, text: str, *, timeout: float | None = None) -> tuple[Token, ...]:
        """Returns the tokens of a text."""
        return responses.tokens(self._call(lambda c: c.service.Tokenize, tokenize_request(text), timeout))

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        """Returns the text of token IDs. Invalid UTF-8 is replaced by U+FFFD."""
        request = detokenize_request(token_ids, skip_special_tokens)
        return self._call(lambda c: c.service.Detokenize, request, timeout).text

    def cancel(self, *request_ids: str, timeout: float | None = None) -> tuple[str, ...]:
        """Cancels requests of this or, with the role `admin`, any caller. Their calls return their partial output.

        Returns the IDs that were in progress. Of several servers, those that are unavailable are skipped.
        """
        request = cancel_request(request_ids)
        if not self._rotation.is_balanced:
            return responses.cancelled([self._call(lambda c: c.service.Cancel, request, timeout)])
        self._check_open()
        attempts = self._attempts(timeout)
        with ExitStack() as stack:
            # Connections of their own also reach servers that drain, and each address of a name.
            calls, late = list[Callable[[], pb.CancelResponse | MptGrpcError]](), list[MptGrpcError]()
            try:
                for address in look_up_all(self._endpoints, attempts.timeout):
                    channel = stack.enter_context(address.channel(Purpose.EVERY))
                    attempt = attempts.at(Server(address.target, Connection(channel)))
                    calls.append(self._start_cancel(request, attempt, stack))
            except TimeoutError:
                late.append(attempts.expired(BEFORE_LOOKUP))
            outcomes = [outcome() for outcome in calls]
        return responses.cancelled([*outcomes, *late])

    def get_model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """Returns information about the loaded model."""
        return responses.model_info(self._call(lambda c: c.service.GetModelInfo, pb.GetModelInfoRequest(), timeout))

    def get_server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns the server's version, limits and load."""
        request = pb.GetServerInfoRequest()
        return responses.server_info(self._call(lambda c: c.service.GetServerInfo, request, timeout))

    def get_engine_state(self, *, timeout: float | None = None) -> debug.EngineState:
        """Returns the requests in progress and the KV cache blocks they hold. It may change in any release."""
        request = debug_pb2.GetEngineStateRequest()
        return debug.engine_state(self._call(lambda c: c.debug_service.GetEngineState, request, timeout))

    def _call(
        self,
        method: Callable[[Connection], grpc.UnaryUnaryMultiCallable[_Request, _Response]],
        request: _Request,
        timeout: float | None,
    ) -> _Response:
        """Calls the next server in turn that responds."""
        attempts, span = self._attempts(timeout), CallSpan(request)
        try:
            while True:
                self._check_open()
                metadata = span.metadata() + self._metadata.current()
                try:
                    response = method(attempts.server.connection)(request, timeout=attempts.timeout, metadata=metadata)
                except grpc.RpcError as error:
                    failure, failed = attempts.translated(error), attempts.server.target
                    pause = attempts.after(failure)
                    if isinstance(pause, MptGrpcError):
                        raise pause from error
                    span.add_attempt(failed, failure)
                    pause_over = threading.Event()
                    with attempts.rotation.pausing(pause_over.set):
                        pause_over.wait(pause)
                else:
                    attempts.succeeded()
                    return response
        except BaseException as error:
            span.fail(error)
            raise
        finally:
            span.end()

    def _start_cancel(
        self, request: pb.CancelRequest, attempts: Attempts[Connection], stack: ExitStack
    ) -> Callable[[], pb.CancelResponse | MptGrpcError]:
        """Calls a server; returns a function that waits for its response or failure."""
        span = CallSpan(request)
        stack.callback(span.end, "CANCELLED")
        metadata = span.metadata() + self._metadata.current()
        call = attempts.server.connection.service.Cancel.future(request, timeout=attempts.timeout, metadata=metadata)

        def outcome() -> pb.CancelResponse | MptGrpcError:
            try:
                response = call.result()
            except grpc.RpcError as error:
                failure = attempts.translated(error)
                failure.__cause__ = error
                span.fail(failure)
                return failure
            span.end()
            return response

        return outcome

    def _stream(self, request: pb.GenerateRequest, timeout: float | None, *, is_unseen: bool = False) -> TextStream:
        attempts = self._attempts(timeout, request)
        span = CallSpan(request, streams=True, on_end=attempts.end)
        continuation = None
        if self._rotation.is_balanced:
            continuation = Continuation(request, resume_inexact=self._resume_inexact, is_unseen=is_unseen)

        def call(server: Server[Connection], timeout: float | None) -> StreamCall:
            self._check_open()
            wanted = request if continuation is None else continuation.request()
            metadata = span.metadata() + self._metadata.current()
            return server.connection.service.StreamGenerate(wanted, timeout=timeout, metadata=metadata)

        return TextStream(call, request.sampling.num_sequences, attempts, continuation, span)

    def _attempts(self, timeout: float | None, generation: pb.GenerateRequest | None = None) -> Attempts[Connection]:
        owner = "client" if timeout is None else "call"
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        return Attempts(self._rotation, timeout, retries=self._retries, owner=owner, generation=generation)

    def _check_open(self) -> None:
        if self._rotation.is_closed:
            raise closed_error()
