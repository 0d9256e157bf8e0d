"""`AsyncClient` and `AsyncTextStream`: what `client.py` offers to threads, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Self, TypeVar, Unpack

import grpc

from mpt.v1 import text_generation_pb2 as pb
from mpt.v1.text_generation_pb2_grpc import TextGenerationServiceStub
from mpt_grpc_client import responses
from mpt_grpc_client.channel import channel_options, resolve_target, trace_metadata
from mpt_grpc_client.errors import MptGrpcError, from_rpc_error
from mpt_grpc_client.prompts import Prompt
from mpt_grpc_client.request import GenerateOptions, build_request
from mpt_grpc_client.results import Delta, EngineState, Generation, ModelInfo, ServerInfo, Token

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class AsyncClient:
    """A connection to one server, for the tasks of one event loop. Every call raises `MptGrpcError` if it fails.

    A task that is cancelled while it waits for a call cancels the call.
    """

    def __init__(self, target: str | None = None, *, timeout_s: float | None = None, retries: bool = True) -> None:
        """Connects at the first call, without TLS. Raises RuntimeError outside of a running event loop.

        target: `host:port`; default: the environment's MPT_GRPC_TARGET, else `localhost:50051`.
        timeout_s: for calls that give none, retries included; None sets no deadline.
        retries: whether a call that is refused, the server being away or full, is sent up to three times more.
        """
        # grpc.aio would bind the channel to some other loop than the one that will run, and hang.
        asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._channel = grpc.aio.insecure_channel(resolve_target(target), channel_options(retries))
        self._stub = TextGenerationServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels the calls in flight and disconnects."""
        await self._channel.close()

    async def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Continues a prompt and answers once; the options are those of `GenerateOptions`."""
        request = build_request(prompt, **options)
        return responses.generation(await self._call(self._stub.Generate, request, timeout_s))

    def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncTextStream:
        """Continues a prompt as `generate` does, and answers piece by piece. The request is on its way at once."""
        request = build_request(prompt, **options)
        call = self._stub.StreamGenerate(request, timeout=self._timeout(timeout_s), metadata=trace_metadata())
        return AsyncTextStream(call, request.sampling.num_sequences)

    async def tokenize(self, text: str, *, timeout_s: float | None = None) -> tuple[Token, ...]:
        """The tokens of a text."""
        return responses.tokens(await self._call(self._stub.Tokenize, pb.TokenizeRequest(text=text), timeout_s))

    async def detokenize(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = True, timeout_s: float | None = None
    ) -> str:
        """The text of tokens; bytes that are no UTF-8 are replaced by U+FFFD."""
        request = pb.DetokenizeRequest(ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._call(self._stub.Detokenize, request, timeout_s)).text

    async def abort(self, *request_ids: str, timeout_s: float | None = None) -> tuple[str, ...]:
        """Ends requests, whoever sent them, and answers those that were in flight; their calls answer what there is."""
        response = await self._call(self._stub.Abort, pb.AbortRequest(request_ids=request_ids), timeout_s)
        return tuple(response.request_ids)

    async def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        """What model is loaded."""
        return responses.model_info(await self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest(), timeout_s))

    async def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """What the server's limits are and how busy it is."""
        return responses.server_info(await self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest(), timeout_s))

    async def engine_state(self, *, timeout_s: float | None = None) -> EngineState:
        """What the engine is doing: its requests, those that ended lately, and the blocks of the KV cache they hold."""
        response = await self._call(self._stub.GetEngineState, pb.GetEngineStateRequest(), timeout_s)
        return responses.engine_state(response)

    async def _call(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout_s: float | None
    ) -> _Response:
        try:
            return await method(request, timeout=self._timeout(timeout_s), metadata=trace_metadata())
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            raise MptGrpcError("the client was closed", code=grpc.StatusCode.CANCELLED) from error

    def _timeout(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s


class AsyncTextStream(responses.PartialGeneration):
    """A generation piece by piece as it comes: iterate over it, or over `deltas()`, once.

    As a context manager it cancels the generation when the block is left early, so that the server stops working on it.
    """

    def __init__(
        self, call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.StreamGenerateResponse], num_sequences: int
    ) -> None:
        super().__init__()
        self._num_sequences = num_sequences
        self._call = call
        self._cancelled = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """The next piece of text, never empty. Raises TypeError for more outputs than one, else as `deltas` does."""
        if self._num_sequences > 1:
            raise TypeError("several outputs are interleaved: iterate over deltas()")
        while (delta := await self._next_delta()) is not None:
            if delta.text:
                return delta.text
        raise StopAsyncIteration

    async def deltas(self) -> AsyncIterator[Delta]:
        """What is new, of any output. Raises `MptGrpcError` if the call fails; ends quietly once it is cancelled."""
        while (delta := await self._next_delta()) is not None:
            yield delta

    def cancel(self) -> None:
        """Ends the generation on the server too; without effect once it has ended."""
        self._cancelled = True
        self._call.cancel()

    async def _next_delta(self) -> Delta | None:
        try:
            piece = await anext(aiter(self._call), None)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            if self._cancelled:
                return None
            raise MptGrpcError("the client was closed", code=grpc.StatusCode.CANCELLED) from error
        return None if piece is None else self._add(piece)


def _is_cancelled() -> bool:
    """Whether the task itself is cancelled; grpc.aio raises the same for a call or a channel that was ended here."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
