"""The reader's side of a request: turns token events into deltas.

`AsyncStream` is read on the event loop, `ThreadStream` by a thread; the engine feeds both. A slow reader of an
`AsyncStream` gets everything that has accumulated in a single delta per output.
"""

from __future__ import annotations

import asyncio
import queue
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import NamedTuple

from mpt_grpc.conversation import ToolCall
from mpt_grpc.engine.assembly import RequestAssembly
from mpt_grpc.engine.prepare import PreparedRequest
from mpt_grpc.results import Finish, Generation, Output, OutputDelta, TokenEvent, TokenLogprob


class _Begun(NamedTuple):
    """What a stream knows once its request has been prepared."""

    prepared: PreparedRequest
    assembly: RequestAssembly


class _Stream:
    """What both kinds of streams have. The scheduler thread calls `begin` before it sends the first event."""

    def __init__(self, request_id: str, cancel: Callable[[], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._begun: _Begun | None = None

    def begin(self, prepared: PreparedRequest, assembly: RequestAssembly) -> None:
        """Sets what the events are assembled with."""
        self._begun = _Begun(prepared, assembly)

    @property
    def prepared(self) -> PreparedRequest:
        """The request as it is generated; available from the first delta on."""
        assert self._begun is not None, "the engine begins a stream before its first event"
        return self._begun.prepared

    @property
    def num_prompt_tokens(self) -> int:
        """The number of tokens of the prompt; 0 until the request has begun."""
        return 0 if self._begun is None else len(self._begun.prepared.prompt_token_ids)

    @property
    def num_input_tokens(self) -> int:
        """The number of tokens of the prompt and of the outputs that are resumed; 0 until the request has begun."""
        if self._begun is None:
            return 0
        return self.num_prompt_tokens + sum(map(len, self._begun.prepared.request.outputs.values()))

    @property
    def num_output_tokens(self) -> int:
        """The number of tokens of all outputs that the reader has got."""
        return 0 if self._begun is None else self._begun.assembly.num_tokens

    @property
    def finishes(self) -> tuple[Finish, ...]:
        """Why those outputs ended whose ends the reader has got."""
        return () if self._begun is None else self._begun.assembly.finishes

    def cancel(self) -> None:
        """Cancels the request; has no effect once it has ended. May be called from any thread."""
        if self._begun is None or not self._begun.assembly.ended:
            self._cancel()

    def _advance(self, events: list[TokenEvent]) -> list[OutputDelta]:
        if self._begun is None:  # the request was refused before it could begin
            error = events.pop().error
            assert error is not None
            try:
                raise error
            finally:
                del error  # a frame that an error's traceback holds must not hold the error
        return self._begun.assembly.advance(events)

    def _has_ended(self) -> bool:
        """Whether the reader has got everything. Raises the error that ended the request."""
        if self._begun is None:
            return False
        if self._begun.assembly.error is not None:
            raise self._begun.assembly.error
        return self._begun.assembly.ended


class AsyncStream(_Stream):
    """A request's outputs as an asynchronous iterator of deltas; `receive` is called on the loop that iterates."""

    def __init__(self, request_id: str, cancel: Callable[[], None]) -> None:
        super().__init__(request_id, cancel)
        self._events: list[TokenEvent] = []
        self._arrived = asyncio.Event()

    def receive(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        while not self._has_ended():
            await self._arrived.wait()
            self._arrived.clear()
            events, self._events = self._events, []
            is_slow = self._begun is not None and self._begun.assembly.is_slow
            for delta in await asyncio.to_thread(self._advance, events) if is_slow else self._advance(events):
                yield delta


class ThreadStream(_Stream):
    """A request's outputs as a blocking iterator of deltas; `receive` may be called by any thread."""

    def __init__(self, request_id: str, cancel: Callable[[], None]) -> None:
        super().__init__(request_id, cancel)
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()

    def receive(self, event: TokenEvent) -> None:
        self._events.put(event)

    def __iter__(self) -> Iterator[OutputDelta]:
        while not self._has_ended():
            yield from self._advance([self._events.get()])


def collect(deltas: Iterable[OutputDelta]) -> Generation:
    """Combines all deltas of a request into its complete outputs."""
    parts: defaultdict[int, list[OutputDelta]] = defaultdict(list)
    stats, prompt_logprobs = None, tuple[TokenLogprob, ...]()
    for delta in deltas:
        parts[delta.index].append(delta)
        prompt_logprobs = prompt_logprobs or delta.prompt_logprobs
        stats = stats or delta.stats
    assert stats is not None, "the last delta has the request's statistics"
    return Generation(tuple(_output(parts[index]) for index in sorted(parts)), prompt_logprobs, stats)


def _output(deltas: list[OutputDelta]) -> Output:
    finish = deltas[-1].finish
    assert finish is not None, "each output ends"
    return Output(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        finish=finish,
        tool_calls=_joined(part for delta in deltas for part in delta.tool_calls),
    )


def _joined(parts: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    """Returns the calls of which these are the parts."""
    calls: dict[int, ToolCall] = {}
    for part in parts:
        begun = calls.get(part.index)
        calls[part.index] = part if begun is None else begun._replace(arguments=begun.arguments + part.arguments)
    return tuple(calls.values())
