"""The asyncio stream, `AsyncTextStream`, the equivalent of `stream.py`."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Self, TypeAlias, TypeVar

import grpc

from mpt_grpc_client import responses
from mpt_grpc_client.continuation import Continuation
from mpt_grpc_client.errors import MptGrpcError, UnavailableError, closed_error
from mpt_grpc_client.failover import Attempts
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub
from mpt_grpc_client.proto.v1alpha1.debug_pb2_grpc import DebugServiceStub
from mpt_grpc_client.results import Delta
from mpt_grpc_client.rotation import Server
from mpt_grpc_client.tracing import CallSpan

_MANY_PARTS = 1024
"""The number of values that are converted in less than a millisecond."""
_FEW_TOKENS = 32
AsyncStreamCall: TypeAlias = "grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.StreamGenerateResponse]"
_Value = TypeVar("_Value")
_Result = TypeVar("_Result")


class AsyncConnection:
    """A channel of the running event loop, and the services of its server."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.service = TextGenerationServiceStub(channel)
        self.debug_service = DebugServiceStub(channel)


class AsyncTextStream(responses.PartialGeneration):
    """A generation in progress. Iterate over it for its text, or over `deltas()` for everything, once.

    As a context manager, it cancels the generation on the server when the block is left before the end.
    """

    def __init__(
        self,
        call: Callable[[Server[AsyncConnection], float | None], AsyncStreamCall],
        num_sequences: int,
        attempts: Attempts[AsyncConnection],
        continuation: Continuation | None,
        span: CallSpan,
    ) -> None:
        """`call` starts the call of a server, with a timeout."""
        super().__init__()
        self._span = span
        self._start_call, self._num_sequences, self._attempts = call, num_sequences, attempts
        self._continuation = continuation
        if continuation is not None:
            self._resumptions = continuation.resumptions
        self._cancelled, self._pause_over = False, asyncio.Event()
        # gRPC cancels the call of a stream that the program no longer has.
        weakref.finalize(self, span.end, "CANCELLED")
        try:
            self._call = call(attempts.server, attempts.timeout)
        except BaseException as error:
            span.fail(error)
            raise

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

    async def deltas(self, *, keep_logprobs: bool = True) -> AsyncIterator[Delta]:
        """Yields the new parts of all outputs. Raises `MptGrpcError` if the call fails; ends when it is cancelled.

        keep_logprobs: whether `result` has the log probabilities of the outputs, too: freeing many at once takes long.
        """
        self._keeps_logprobs = keep_logprobs
        while (delta := await self._next_delta()) is not None:
            yield delta

    def cancel(self) -> None:
        """Cancels the generation on the server. Has no effect once it has ended."""
        self._cancelled = True
        self._call.cancel()
        self._pause_over.set()
        self._span.end("CANCELLED")

    async def _next_delta(self) -> Delta | None:
        try:
            delta = await self._received()
        except BaseException as error:
            # grpc.aio leaves the call as it is if the task is cancelled between two of its steps.
            self._call.cancel()
            self._span.fail(error)
            raise
        if delta is None or self._result is not None:
            self._span.end()
        return delta

    async def _received(self) -> Delta | None:
        continuation = self._continuation
        while not self._cancelled:
            try:
                chunk = await anext(aiter(self._call), None)
                if chunk is not None and continuation is not None:
                    chunk = continuation.receive(chunk, self._attempts.server.target)
            except grpc.RpcError as error:
                if continuation is not None and continuation.has_ended:
                    return None
                await self._go_on(self._attempts.translated(error, self._progress), error)
            except UnavailableError as error:
                self._call.cancel()
                await self._go_on(error, error)
            except asyncio.CancelledError as error:
                if is_cancelled():
                    raise
                if self._cancelled:
                    return None
                raise closed_error() from error
            else:
                if chunk is None:
                    return None
                self._attempts.succeeded(chunk.output.num_tokens)
                return await converted(self._add, chunk, _num_parts(chunk))
        return None

    async def _go_on(self, failure: MptGrpcError, cause: Exception) -> None:
        """Calls the next server, unless the stream is cancelled. Raises the failure if there is none."""
        if self._cancelled:
            return
        failed = self._attempts.server.target
        pause = self._attempts.after(failure)
        if isinstance(pause, MptGrpcError):
            raise pause from cause
        self._span.add_attempt(failed, failure)
        await wait(pause, self._attempts, self._pause_over)
        if not self._cancelled:
            self._call = self._start_call(self._attempts.server, self._attempts.timeout)


async def converted(convert: Callable[[_Value], _Result], value: _Value, num_parts: int) -> _Result:
    """Returns the converted value; one of many parts is converted in a thread, so as not to block the event loop."""
    return await asyncio.to_thread(convert, value) if num_parts > _MANY_PARTS else convert(value)


def _num_parts(chunk: pb.StreamGenerateResponse) -> int:
    """Returns the number of values in a chunk; 0 for a small one, whose lists would cost more to look at."""
    is_small = chunk.output.num_tokens <= _FEW_TOKENS and not chunk.HasField("prompt")
    return 0 if is_small else responses.num_parts(chunk.prompt, chunk.output)


async def wait(pause: float, attempts: Attempts[AsyncConnection], over: asyncio.Event) -> None:
    """Waits as long as there is to wait before the next attempt, unless it is over earlier or the client is closed."""
    with attempts.rotation.pausing(over.set), suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), pause)


def is_cancelled() -> bool:
    """Whether the task itself is cancelled; grpc.aio raises the same error for a call or channel closed by us."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
