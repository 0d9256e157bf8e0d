"""The synchronous client: `Client` and `TextStream`. `async_client.py` has their asyncio equivalents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Self, TypeVar, Unpack

import grpc

from mpt_grpc_client import debug, responses
from mpt_grpc_client.channel import (
    ConnectionOptions,
    check_timeout,
    proxy_variable,
    resolve,
    trace_metadata,
)
from mpt_grpc_client.errors import closed_error, from_rpc_error
from mpt_grpc_client.prompts import Prompt
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub
from mpt_grpc_client.proto.v1alpha1 import debug_pb2
from mpt_grpc_client.proto.v1alpha1.debug_pb2_grpc import DebugServiceStub
from mpt_grpc_client.request import GenerateOptions, build_request
from mpt_grpc_client.results import Delta, Generation, ModelInfo, ServerInfo, Token

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Client:
    """A connection to a server, which threads may share. Every call that fails raises `MptGrpcError`."""

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float | None = None,
        retries: bool = True,
        channel: grpc.Channel | None = None,
        **connection: Unpack[ConnectionOptions],
    ) -> None:
        """Creates a client, which connects at its first call.

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
        self._connection = _Connection(channel or endpoint.channel(retries))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the calls in progress and disconnects."""
        self._connection.is_closed = True
        self._connection.channel.close()

    def with_metadata(self, *metadata: tuple[str, str]) -> Self:
        """Returns a client whose calls also send this metadata, on the connection of this client."""
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
        return responses.generation(self._call(self._connected.service.Generate, request, timeout))

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **options: Unpack[GenerateOptions]) -> TextStream:
        """Generates a continuation of the prompt and streams it. The request is sent immediately.

        timeout: the timeout of the whole stream in seconds; None uses the client's.
        options: see `GenerateOptions`.
        """
        request = build_request(prompt, **options)
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        metadata = trace_metadata() + self._metadata
        call = self._connected.service.StreamGenerate(request, timeout=timeout, metadata=metadata)
        return TextStream(call, request.sampling.num_sequences, self._target, timeout)

    def tokenize(self, text: str, *, timeout: float | None = None) -> tuple[Token, ...]:
        """Returns the tokens of a text."""
        return responses.tokens(self._call(self._connected.service.Tokenize, pb.TokenizeRequest(text=text), timeout))

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout: float | None = None
    ) -> str:
        """Returns the text of token IDs. Invalid UTF-8 is replaced by U+FFFD."""
        request = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._call(self._connected.service.Detokenize, request, timeout).text

    def cancel(self, *request_ids: str, timeout: float | None = None) -> tuple[str, ...]:
        """Cancels requests of this or, with the role `admin`, any caller. Their calls return their partial output.

        Returns the IDs that were in progress.
        """
        response = self._call(self._connected.service.Cancel, pb.CancelRequest(request_ids=request_ids), timeout)
        return tuple(response.request_ids)

    def get_model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """Returns information about the loaded model."""
        return responses.model_info(self._call(self._connected.service.GetModelInfo, pb.GetModelInfoRequest(), timeout))

    def get_server_info(self, *, timeout: float | None = None) -> ServerInfo:
        """Returns the server's version, limits and load."""
        return responses.server_info(
            self._call(self._connected.service.GetServerInfo, pb.GetServerInfoRequest(), timeout)
        )

    def get_engine_state(self, *, timeout: float | None = None) -> debug.EngineState:
        """Returns the requests in progress and the KV cache blocks they hold. It may change in any release."""
        request = debug_pb2.GetEngineStateRequest()
        return debug.engine_state(self._call(self._connected.debug_service.GetEngineState, request, timeout))

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout: float | None
    ) -> _Response:
        timeout = self._timeout if timeout is None else check_timeout(timeout)
        try:
            return method(request, timeout=timeout, metadata=trace_metadata() + self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, self._target, timeout, proxy_variable(self._target)) from error

    @property
    def _connected(self) -> _Connection:
        """The connection. Raises MptGrpcError once the client is closed."""
        if self._connection.is_closed:
            raise closed_error()
        return self._connection


class _Connection:
    """A channel, which several clients may share."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel, self.is_closed = channel, False
        self.service = TextGenerationServiceStub(channel)
        self.debug_service = DebugServiceStub(channel)


class TextStream(responses.PartialGeneration):
    """A generation in progress. Iterate over it for its text, or over `deltas()` for everything, once.

    As a context manager, it cancels the generation on the server when the block is left before the end.
    """

    def __init__(
        self,
        call: grpc._CallIterator[pb.StreamGenerateResponse],
        num_sequences: int,
        target: str,
        timeout: float | None,
    ) -> None:
        super().__init__()
        self._call, self._num_sequences, self._target, self._timeout = call, num_sequences, target, timeout
        self._cancelled = False

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
        try:
            chunk = next(self._call, None)
        except grpc.RpcError as error:
            if self._cancelled:
                return None
            raise from_rpc_error(error, self._target, self._timeout, proxy_variable(self._target)) from error
        return None if chunk is None else self._add(chunk)
