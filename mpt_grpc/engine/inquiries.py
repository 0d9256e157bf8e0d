"""Questions about the engine's state, which the scheduler thread answers between two steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from mpt_grpc.engine.state import EngineState
from mpt_grpc.errors import UnavailableError


class StateInquiries:
    """The futures that wait for the state. Any thread may ask; those who wait at the same time get the same answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._futures: list[Future[EngineState]] = []
        self._refusal: UnavailableError | None = None

    def ask(self) -> Future[EngineState]:
        """Returns a future for the state. Raises UnavailableError after `refuse`."""
        future: Future[EngineState] = Future()
        with self._lock:
            if self._refusal is not None:
                raise self._refusal.again()
            self._futures.append(future)
        return future

    def answer(self, state: Callable[[], EngineState]) -> None:
        """Answers those who have asked, if any."""
        if num_asked := len(self._futures):
            value = state()  # if this fails, `refuse` fails those who have asked
            for future in self._taken(num_asked):
                future.set_result(value)

    def refuse(self, why: UnavailableError) -> None:
        """Fails those who have asked, and all who ask from now on."""
        with self._lock:
            self._refusal = why
        for future in self._taken():
            future.set_exception(why.again())

    def _taken(self, number: int | None = None) -> list[Future[EngineState]]:
        """Removes a number of futures, the oldest, or all, and returns those that are still wanted."""
        with self._lock:
            futures = self._futures[:number]
            del self._futures[:number]
        return [future for future in futures if future.set_running_or_notify_cancel()]
