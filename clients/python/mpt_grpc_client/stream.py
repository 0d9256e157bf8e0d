"""The synchronous stream, `TextStream`; `async_stream.py` has its asyncio equivalent."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Self, TypeAlias

import grpc

from mpt_grpc_client import responses
from mpt_grpc_client.continuation import Continuation
from mpt_grpc_client.errors import MptGrpcError, UnavailableError
from mpt_grpc_client.failover import Attempts
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub
from mpt_grpc_client.proto.v1alpha1.debug_pb2_grpc import DebugServiceStub
from mpt_grpc_client.results import Delta
from mpt_grpc_client.rotation import Server
from mpt_grpc_client.tracing import CallSpan

StreamCall: TypeAlias = "grpc._CallIterator[pb.StreamGenerateResponse]"


class Connection:
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
        call: Callable[[Server[Connection], float | None], StreamCall],
        num_sequences: int,
        attempts: Attempts[Connection],
        continuation: Continuation | None,
        span: CallSpan,
    ) -> None:
        """`call` starts the call of a server, with a timeout."""
        super().__init__()
        self._span, self._process = span, os.getpid()
        self._start_call, self._num_sequences, self._attempts = call, num_sequences, attempts
        self._continuation = continuation
        if continuation is not None:
            self._resumptions = continuation.resumptions
        self._cancelled, self._pause_over = False, threading.Event()
        # gRPC cancels the call of a stream that the program no longer has.
        weakref.finalize(self, span.end, "CANCELLED")
        try:
            self._call = call(attempts.server, attempts.timeout)
        except BaseException as error:
            span.fail(error)
            raise

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

    def deltas(self, *, keep_logprobs: bool = True) -> Iterator[Delta]:
        """Yields the new parts of all outputs. Raises `MptGrpcError` if the call fails; ends when it is cancelled.

        keep_logprobs: whether `result` has the log probabilities of the outputs, too: freeing many at once takes long.
        """
        self._keeps_logprobs = keep_logprobs
        while (delta := self._next_delta()) is not None:
            yield delta

    def cancel(self) -> None:
        """Cancels the generation on the server. Has no effect once it has ended. Any thread may call it."""
        self._cancelled = True
        self._call.cancel()
        self._pause_over.set()
        self._span.end("CANCELLED")

    def _next_delta(self) -> Delta | None:
        if os.getpid() != self._process:
            raise RuntimeError("this stream belongs to the process that started it, and cannot be read in a fork of it")
        try:
            delta = self._received()
        except BaseException as error:
            self._span.fail(error)
            raise
        if delta is None or self._result is not None:
            self._span.end()
        return delta

    def _received(self) -> Delta | None:
        continuation = self._continuation
        while not self._cancelled:
            try:
                chunk = next(self._call, None)
                if chunk is not None and continuation is not None:
                    chunk = continuation.receive(chunk, self._attempts.server.target)
            except grpc.RpcError as error:
                if continuation is not None and continuation.has_ended:
                    return None
                self._go_on(self._attempts.translated(error, self._progress), error)
            except UnavailableError as error:
                self._call.cancel()
                self._go_on(error, error)
            else:
                if chunk is None:
                    return None
                self._attempts.succeeded(chunk.output.num_tokens)
                return self._add(chunk)
        return None

    def _go_on(self, failure: MptGrpcError, cause: Exception) -> None:
        """Calls the next server, unless the stream is cancelled. Raises the failure if there is none."""
        if self._cancelled:
            return
        failed = self._attempts.server.target
        pause = self._attempts.after(failure)
        if isinstance(pause, MptGrpcError):
            raise pause from cause
        self._span.add_attempt(failed, failure)
        with self._attempts.rotation.pausing(self._pause_over.set):
            self._pause_over.wait(pause)
        if not self._cancelled:
            self._call = self._start_call(self._attempts.server, self._attempts.timeout)
        # Another thread may have cancelled the stream meanwhile, when it had the earlier call.
        if self._cancelled:
            self._call.cancel()
