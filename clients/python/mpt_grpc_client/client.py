"""The synchronous client: `Client` and `TextStream`. `async_client.py` has their asyncio equivalents."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Self, TypeAlias, TypeVar, Unpack

import grpc

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

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_StreamCall: TypeAlias = "grpc._CallIterator[pb.StreamGenerateResponse]"


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
        retries: whether to retry calls up to three times while all servers are unavailable or overloaded.
        resume_inexact: whether a server with another fingerprint may continue a generation.
        channel: a channel to the target instead of the client's own; it has its own options, so `retries` and those of
            the connection have no effect. The client closes it.
        connection: see `ConnectionOptions`.
        """
        self._endpoints = endpoints = resolve(target, connection, has_channel=channel is not None)
        self._timeout, self._metadata = check_timeout(timeout), endpoints[0].metadata
        self._retries, self._resume_inexact = retries, resume_inexact
        balanced = is_balanced(endpoints, channel)

        def server(endpoint: Endpoint) -> Server[_Connection]:
            return Server(endpoint.target, _Connection(channel or endpoint.channel(retries, balanced=balanced)))

        self._rotation = Rotation(map(server, endpoints), is_balanced=balanced)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the calls in progress and disconnects."""
        self._rotation.is_closed = True
        for server in self._rotation.servers:
            server.connection.channel.close()

    def with_metadata(self, *metadata: tuple[str, str]) -> Self:
        """Returns a client whose calls also send this metadata, on the connections of this client."""
        client = copy(self)
        client._metadata = (*self._metadata, *metadata)
        return client

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Generates a continuation of the prompt and returns it when it is complete.

        timeout: the timeout of the call in seconds; None uses the client's. After `time_limit`, by contrast, the call
        returns its partial output.
        options: see `GenerateOptions`.
        """
        request = build_request(prompt, **options)
        if not self._rotation.is_balanced:
            return responses.generation(self._call(lambda connection: connection.service.Generate, request, timeout))
        request.output_options.chunk_tokens = UNSEEN_CHUNK_TOKENS
        with self._stream(request, timeout) as stream:
            for _ in stream.deltas():
                pass
        return stream.result

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]) -> TextStream:
        """Generates a continuation of the prompt and streams it. The request is sent immediately.

        timeout: the timeout of the whole stream in seconds; None uses the client's.
        options: see `GenerateOptions`.
        """
        return self._stream(build_request(prompt, **options), timeout)

    def tokenize(self, text: str, *, timeout: float | None = None) -> tuple[Token, ...]:
        """Returns the tokens of a text."""
        return responses.tokens(self._call(lambda c: c.service.Tokenize, pb.TokenizeRequest(text=text), timeout))

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        """Returns the text of token IDs. Invalid UTF-8 is replaced by U+FFFD."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._call(lambda c: c.service.Detokenize, request, timeout).text

    def cancel(self, *request_ids: str, timeout: float | None = None) -> tuple[str, ...]:
        """Cancels requests of this or, with the role `admin`, any caller. Their calls return their partial output.

        Returns the IDs that were in progress. Of several servers, those that are unavailable are skipped.
        """
        request, failures, found = pb.CancelRequest(request_ids=request_ids), list[UnavailableError](), list[str]()
        with self._each_server() as servers:
            for server in servers:
                try:
                    found += self._call(lambda c: c.service.Cancel, request, timeout, server).request_ids
                except UnavailableError as error:
                    failures.append(error)
        if len(failures) == len(servers):
            raise failures[0]
        return tuple(dict.fromkeys(found))

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
        method: Callable[[_Connection], grpc.UnaryUnaryMultiCallable[_Request, _Response]],
        request: _Request,
        timeout: float | None,
        server: Server[_Connection] | None = None,
    ) -> _Response:
        """Calls the given server, or the next one in turn that responds."""
        attempts = self._attempts(timeout, server)
        while True:
            self._check_open()
            try:
                response = method(attempts.server.connection)(
                    request, timeout=attempts.timeout, metadata=trace_metadata() + self._metadata
                )
            except grpc.RpcError as error:
                pause = attempts.after(attempts.translated(error))
                if isinstance(pause, MptGrpcError):
                    raise pause from error
                time.sleep(pause)
            else:
                attempts.succeeded()
                return response

    @contextmanager
    def _each_server(self) -> Iterator[Sequence[Server[_Connection]]]:
        """Yields all servers, each with a connection of its own: also those that drain, and the addresses of names."""
        if not self._rotation.is_balanced:
            yield self._rotation.servers
            return
        addresses = [address for endpoint in self._endpoints for address in endpoint.addresses()]
        with ExitStack() as stack:
            channels = [stack.enter_context(a.channel(False, balanced=True, checks_health=False)) for a in addresses]
            yield [Server(a.target, _Connection(channel)) for a, channel in zip(addresses, channels, strict=True)]

    def _stream(self, request: pb.GenerateRequest, timeout: float | None) -> TextStream:
        metadata = trace_metadata() + self._metadata

        def call(server: Server[_Connection], timeout: float | None) -> _StreamCall:
            self._check_open()
            wanted = request if continuation is None else continuation.request()
            return server.connection.service.StreamGenerate(wanted, timeout=timeout, metadata=metadata)

        continuation = None
        if self._rotation.is_balanced:
            continuation = Continuation(request, resume_inexact=self._resume_inexact)
        return TextStream(call, request.sampling.num_sequences, self._attempts(timeout), continuation)

    def _attempts(self, timeout: float | None, server: Server[_Connection] | None = None) -> Attempts[_Connection]:
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        rotation = self._rotation if server is None else Rotation([server], is_balanced=False)
        return Attempts(rotation, timeout, retries=self._retries)

    def _check_open(self) -> None:
        if self._rotation.is_closed:
            raise closed_error()


class _Connection:
    """A channel to a server, and its services."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.service = TextGenerationServiceStub(channel)
        self.debug_service = DebugServiceStub(channel)


class TextStream(responses.PartialGeneration):
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """Returns the next piece of text, which is never empty.

        Raises TypeError if several outputs were requested, and otherwise the same as `deltas`.
        """
        if self._num_sequences > 1:
            raise TypeError("the outputs are interleaved; iterate over deltas() instead")
        while (delta := self._next_delta()) is not None:
            if delta.text:
                return delta.text
        raise StopIteration

    def deltas(self) -> Iterator[Delta]:
        """Yields the new parts of all outputs. Raises `MptGrpcError` if the call fails; ends when it is cancelled."""
        while (delta := self._next_delta()) is not None:
            yield delta

    def cancel(self) -> None:
        """Cancels the generation on the server. Has no effect once it has ended. Any thread may call it."""
        self._cancelled = True
        self._call.cancel()

    def _next_delta(self) -> Delta | None:
        continuation = self._continuation
        while True:
            try:
                chunk = next(self._call, None)
                if chunk is not None and continuation is not None:
                    chunk = continuation.receive(chunk, self._attempts.server.target)
            except grpc.RpcError as error:
                if self._cancelled or (continuation is not None and continuation.has_ended):
                    return None
                self._go_on(self._attempts.translated(error), error)
            except UnavailableError as error:
                self._call.cancel()
                self._go_on(error, error)
            else:
                if chunk is None:
                    return None
                self._attempts.succeeded(chunk.output.num_tokens)
                return self._add(chunk)

    def _go_on(self, failure: MptGrpcError, cause: Exception) -> None:
        """Calls the next server. Raises the failure if there is none."""
        pause = self._attempts.after(failure)
        if isinstance(pause, MptGrpcError):
            raise pause from cause
        time.sleep(pause)
        self._call = self._start_call(self._attempts.server, self._attempts.timeout)
        if self._cancelled:
            self._call.cancel()
