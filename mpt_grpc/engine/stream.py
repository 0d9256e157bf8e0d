"""The reader's side of a request: turns token events into deltas.

`AsyncStream` is read on the event loop, `ThreadStream` by a thread; the engine feeds both. A slow reader of an
`AsyncStream` gets everything that has accumulated in a single delta per output.
"""

from __future__ import annotations

import asyncio
import queue
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator

from mpt_grpc.engine.assembly import RequestAssembly
from mpt_grpc.engine.prepare import PreparedRequest
from mpt_grpc.request import Generation, Output, OutputDelta, TokenEvent, TokenLogprob


class AsyncStream:
    """A request's outputs as an asynchronous iterator of deltas; `receive` is called on the loop that iterates."""

    def __init__(self, prepared: PreparedRequest, assembly: RequestAssembly) -> None:
        self.prepared = prepared
        self.cancel = assembly.cancel
        self._assembly = assembly
        self._events: list[TokenEvent] = []
        self._arrived = asyncio.Event()

    def receive(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        assembly = self._assembly
        while not assembly.ended:
            await self._arrived.wait()
            self._arrived.clear()
            events, self._events = self._events, []
            advance = assembly.advance
            for delta in await asyncio.to_thread(advance, events) if assembly.is_guarded else advance(events):
                yield delta
        if assembly.error is not None:
            raise assembly.error


class ThreadStream:
    """A request's outputs as a blocking iterator of deltas; `receive` may be called by any thread."""

    def __init__(self, prepared: PreparedRequest, assembly: RequestAssembly) -> None:
        self.prepared = prepared
        self.cancel = assembly.cancel
        self._assembly = assembly
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()

    def receive(self, event: TokenEvent) -> None:
        self._events.put(event)

    def __iter__(self) -> Iterator[OutputDelta]:
        while not self._assembly.ended:
            yield from self._assembly.advance([self._events.get()])
        if self._assembly.error is not None:
            raise self._assembly.error


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
    )
