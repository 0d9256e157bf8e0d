"""Hands the events of the steps to their readers, all of a step at once, on the readers' event loop.

While the loop is busy, events of several steps are handed over together, so that readers get several tokens at a time
instead of falling behind, and the scheduler thread gets its share of the interpreter. However many requests end at
once, the tokens of the others do not wait for that.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

Delivery = tuple[Callable[[Any], None], Any]
"""An event or a report, and the method of the reader's stream or of the observer that receives it."""

_MAX_DELAY_S = 0.020
"""How long an event waits at most while the loop could take it."""
_REST = 2
"""How many times as long as the readers took the next hand-over waits: up to the longest delay, they get a third of the
interpreter's time."""
_BUSY_S = 0.001
"""Readers that take less time than this for a hand-over do not delay the next one."""
_READERS_A_TURN = 8
"""The readers, or ends, that run in one turn of the loop: about a millisecond of work."""
_Reader = tuple[Callable[[Any], None], list[Any]]
"""A method that receives deliveries, and what these are."""


class Outbox:
    """The deliveries that are yet to be handed over. Any thread may call `put`; the readers run on `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Without a loop, `put` calls the receivers itself."""
        self._loop = loop
        self._lock = threading.Lock()
        self._tokens: list[Delivery] = []
        self._ends: list[Delivery] = []
        self._is_scheduled = False
        """Whether a hand-over is already planned."""
        self._handed_over_ends: deque[Delivery] = deque()
        """Those that wait for their turn of the loop."""

    def put(self, tokens: Iterable[Delivery], ends: Iterable[Delivery] = ()) -> None:
        """Delivers the tokens, those of each reader in order and readers by their first one, then the ends in order.

        ends: the last event of each request that has ended, and reports. Later tokens do not wait for them.
        """
        if self._loop is None:
            for receive, event in (*tokens, *ends):
                receive(event)
            return
        with self._lock:
            self._tokens += tokens
            self._ends += ends
            if self._is_scheduled or not (self._tokens or self._ends) or self._loop.is_closed():
                return
            self._is_scheduled = True
        self._loop.call_soon_threadsafe(self._hand_over, self._loop)

    async def delivered(self) -> None:
        """Waits until nothing is left to hand over; to be called on the loop."""
        # An event of asyncio could not be cleared by the threads that put.
        while self._is_scheduled or self._handed_over_ends:  # noqa: ASYNC110
            await asyncio.sleep(_BUSY_S)

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            tokens, self._tokens = self._tokens, []
            ends, self._ends = self._ends, []
            if not (tokens or ends):
                self._is_scheduled = False
                return
        by_reader: defaultdict[Callable[[Any], None], list[Any]] = defaultdict(list)
        for receive, event in tokens:
            by_reader[receive].append(event)
        self._pass_on(loop, list(by_reader.items()), ends, loop.time())

    def _pass_on(
        self, loop: asyncio.AbstractEventLoop, readers: list[_Reader], ends: list[Delivery], start_s: float
    ) -> None:
        """Gives the tokens to a few readers in each turn of the loop, so that other callbacks need not wait for all."""
        for receive, events in readers[:_READERS_A_TURN]:
            for event in events:
                receive(event)
        if rest := readers[_READERS_A_TURN:]:
            loop.call_soon(self._pass_on, loop, rest, ends, start_s)
            return
        are_waiting = bool(self._handed_over_ends)
        self._handed_over_ends += ends
        if not are_waiting:
            self._pass_on_ends(loop)
        # The readers run in the next turn, and those who read from them, as the gateway does, in the one after.
        loop.call_soon(loop.call_soon, self._after_readers, loop, start_s)

    def _pass_on_ends(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            for _ in range(min(_READERS_A_TURN, len(self._handed_over_ends))):
                receive, event = self._handed_over_ends.popleft()
                receive(event)
        finally:  # also if an observer fails
            if self._handed_over_ends:
                loop.call_soon(self._pass_on_ends, loop)

    def _after_readers(self, loop: asyncio.AbstractEventLoop, start_s: float) -> None:
        """Runs when the readers have processed a hand-over: leaves the scheduler thread time until the next one."""
        busy_s = loop.time() - start_s
        if busy_s < _BUSY_S:
            self._hand_over(loop)
        else:
            loop.call_later(min(_REST * busy_s, _MAX_DELAY_S), self._hand_over, loop)
