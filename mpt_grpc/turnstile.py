"""A limit on how many requests begin, or end, in a turn of an event loop, so that a burst does not stop it for all."""

from __future__ import annotations

import asyncio
from collections import deque

_PASSING_A_TURN = 2
"""About a millisecond of work."""


class Turnstile:
    """Lets through a few coroutines in each turn of the event loop, in the order in which they arrive."""

    def __init__(self) -> None:
        self._num_passed = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._counts = False
        """Whether the next turn of the loop will reset the count."""
        self._is_open = False

    async def wait(self) -> None:
        """Returns when it is the caller's turn."""
        if self._is_open:
            return
        loop = asyncio.get_running_loop()
        if not self._counts:
            self._counts = True
            loop.call_soon(self._next_turn, loop)
        if self._num_passed < _PASSING_A_TURN and not self._waiting:
            self._num_passed += 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    def open(self) -> None:
        """Lets all through from now on, those who wait in the next turn of the loop."""
        self._is_open = True
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(None)

    def _next_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_passed = 0
        while self._waiting and self._num_passed < _PASSING_A_TURN:
            turn = self._waiting.popleft()
            if not turn.done():  # its caller may have left
                turn.set_result(None)
                self._num_passed += 1
        self._counts = self._num_passed > 0
        if self._counts:
            loop.call_soon(self._next_turn, loop)
