"""`Client` and `TextStream`: calls to the server from threads. Their asyncio twins are in `async_client.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self, TypeVar, Unpack

import grpc

from mpt.v1 import text_generation_pb2 as pb
from mpt.v1.text_generation_pb2_grpc import TextGenerationServiceStub
from mpt_grpc_client import responses
from mpt_grpc_client.channel import channel_options, resolve_target, trace_metadata
from mpt_grpc_client.errors import from_rpc_error
from mpt_grpc_client.prompts import Prompt
from mpt_grpc_client.request import GenerateOptions, build_request
from mpt_grpc_client.results import Delta, EngineState, Generation, ModelInfo, ServerInfo, Token

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Client:
    """A connection to one server; threads may share it. Every call raises `MptGrpcError` if it fails."""

    def __init__(self, target: str | None = None, *, timeout_s: float | None = None, retries: bool = True) -> None:
        """Connects at the first call, without TLS.

        target: `host:port`; default: the environment's MPT_GRPC_TARGET, else `localhost:50051`.
        timeout_s: for calls that give none, retries included; None sets no deadline.
        retries: whether a call that is refused, the server being away or full, is sent up to three times more.
        """
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(resolve_target(target), channel_options(retries))
        self._stub = TextGenerationServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the calls in flight and disconnects."""
        self._channel.close()

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Continues a prompt and answers once; the options are those of `GenerateOptions`."""
        request = build_request(prompt, **options)
        return responses.generation(self._call(self._stub.Generate, request, timeout_s))

    def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> TextStream:
        """Continues a prompt as `generate` does, and answers piece by piece. The request is on its way at once."""
        request = build_request(prompt, **options)
        call = self._stub.StreamGenerate(request, timeout=self._timeout(timeout_s), metadata=trace_metadata())
        return TextStream(call, request.sampling.num_sequences)

    def tokenize(self, text: str, *, timeout_s: float | None = None) -> tuple[Token, ...]:
        """The tokens of a text."""
        return responses.tokens(self._call(self._stub.Tokenize, pb.TokenizeRequest(text=text), timeout_s))

    def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout_s: float | None = None
    ) -> str:
        """The text of tokens; bytes that are no UTF-8 are replaced by U+FFFD."""
        request = pb.DetokenizeRequest(ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._call(self._stub.Detokenize, request, timeout_s).text

    def abort(self, *request_ids: str, timeout_s: float | None = None) -> tuple[str, ...]:
        """Ends requests, whoever sent them, and answers those that were in flight; their calls answer what there is."""
        response = self._call(self._stub.Abort, pb.AbortRequest(request_ids=request_ids), timeout_s)
        return tuple(response.request_ids)

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What model is loaded."""
        return responses.model_info(self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest(), timeout_s))

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """What the server's limits are and how busy it is."""
        return responses.server_info(self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest(), timeout_s))

    def engine_state(self, *, timeout_s: float | None = None) -> EngineState:
        """What the engine is doing: its requests, those that ended lately, and the blocks of the KV cache they hold."""
        response = self._call(self._stub.GetEngineState, pb.GetEngineStateRequest(), timeout_s)
        return responses.engine_state(response)

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout_s: float | None
    ) -> _Response:
        try:
            return method(request, timeout=self._timeout(timeout_s), metadata=trace_metadata())
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s


class TextStream(responses.PartialGeneration):
    """A generation piece by piece as it comes: iterate over it, or over `deltas()`, once.

    As a context manager it cancels the generation when the block is left early, so that the server stops working on it.
    """

    def __init__(self, call: grpc._CallIterator[pb.StreamGenerateResponse], num_sequences: int) -> None:
        super().__init__()
        self._num_sequences = num_sequences
        self._call = call
        self._cancelled = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """The next piece of text, never empty. Raises TypeError for more outputs than one, else as `deltas` does."""
        if self._num_sequences > 1:
            raise TypeError("several outputs are interleaved: iterate over deltas()")
        while (delta := self._next_delta()) is not None:
            if delta.text:
                return delta.text
        raise StopIteration

    def deltas(self) -> Iterator[Delta]:
        """What is new, of any output. Raises `MptGrpcError` if the call fails; ends quietly once it is cancelled."""
        while (delta := self._next_delta()) is not None:
            yield delta

    def cancel(self) -> None:
        """Ends the generation on the server too; without effect once it has ended. Any thread may call it."""
        self._cancelled = True
        self._call.cancel()

    def _next_delta(self) -> Delta | None:
        try:
            piece = next(self._call, None)
        except grpc.RpcError as error:
            if self._cancelled:
                return None
            raise from_rpc_error(error) from error
        return None if piece is None else self._add(piece)
