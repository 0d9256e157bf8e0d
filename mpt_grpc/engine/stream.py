"""One request's output on its reader's side: token events in, pieces of text out.

A reader that comes late finds all that has happened since in one piece. `AsyncStream` is read on the event loop,
`ThreadStream` by a thread; both are fed by the engine.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from mpt_grpc.request import Finish, FinishReason, GenerationRequest, Output, OutputDelta, TokenEvent
from mpt_grpc.text.detokenizer import TextAssembler

_TEXTLESS = (FinishReason.EOS_TOKEN, FinishReason.STOP_TOKEN)


class OutputAssembly:
    """Turns the events of one request into deltas. After a matched stop string it only waits for the account."""

    def __init__(self, text: TextAssembler, end_request: Callable[[], None]) -> None:
        """`end_request` tells the engine that no more tokens are wanted."""
        self._text, self._end_request = text, end_request
        self.ended = False

    def advance(self, events: Iterable[TokenEvent]) -> Iterator[OutputDelta]:
        """Yields what is new as one delta, if anything is; then raises the error, if one has ended the request."""
        text, error = "", None
        token_ids: list[int] = []
        for event in events:
            self.ended = event.finish is not None or event.error is not None
            error = event.error
            if self._text.stop_string is None:
                piece, used = self._feed(event)
                text += piece
                token_ids += event.token_ids[:used]
            if event.finish is not None:
                yield self._last(text, token_ids, event)
                return
        if text or token_ids:
            yield OutputDelta(text, tuple(token_ids))
        if error is not None:
            raise error

    def cancel(self) -> None:
        """Ends the request; without effect once it has ended."""
        if not self.ended:
            self._end_request()

    def _feed(self, event: TokenEvent) -> tuple[str, int]:
        """Returns the text of the event's tokens, and how many of them belong to the output."""
        textless = event.finish is not None and event.finish.reason in _TEXTLESS
        assembled = self._text.feed(event.token_ids[:-1] if textless else event.token_ids)
        if assembled.stop_string is None:
            return assembled.text, len(event.token_ids)
        self.cancel()
        return assembled.text, assembled.num_tokens

    def _last(self, text: str, token_ids: list[int], event: TokenEvent) -> OutputDelta:
        text += self._text.finish()  # nothing after a stop string, but it may complete one
        stop_string = self._text.stop_string
        finish = event.finish if stop_string is None else Finish(FinishReason.STOP_STRING, stop_string=stop_string)
        return OutputDelta(text, tuple(token_ids), finish, event.stats)


class AsyncStream:
    """An output as an asynchronous iterator of deltas; `receive` is called on the loop that iterates."""

    def __init__(self, request: GenerationRequest, prompt_token_ids: tuple[int, ...], assembly: OutputAssembly) -> None:
        self.request, self.prompt_token_ids = request, prompt_token_ids
        self.cancel = assembly.cancel
        self._assembly = assembly
        self._events: list[TokenEvent] = []
        self._arrived = asyncio.Event()

    def receive(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        while not self._assembly.ended:
            await self._arrived.wait()
            self._arrived.clear()
            events, self._events = self._events, []
            for delta in self._assembly.advance(events):
                yield delta


class ThreadStream:
    """An output as a blocking iterator of deltas; `receive` may be called by any thread."""

    def __init__(self, request: GenerationRequest, prompt_token_ids: tuple[int, ...], assembly: OutputAssembly) -> None:
        self.request, self.prompt_token_ids = request, prompt_token_ids
        self.cancel = assembly.cancel
        self._assembly = assembly
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()

    def receive(self, event: TokenEvent) -> None:
        self._events.put(event)

    def __iter__(self) -> Iterator[OutputDelta]:
        while not self._assembly.ended:
            yield from self._assembly.advance([self._events.get()])


def collect(deltas: Iterable[OutputDelta]) -> Output:
    """Joins all the deltas of an ended output."""
    deltas = tuple(deltas)
    last = deltas[-1]
    assert last.finish is not None
    assert last.stats is not None
    return Output(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish=last.finish,
        stats=last.stats,
    )
