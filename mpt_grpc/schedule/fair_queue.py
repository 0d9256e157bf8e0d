"""Start-time fair queueing: an order of requests in which no caller waits for all that another one has sent.

Each request starts, in units of tokens, where the caller's last one ends, but not before the present. Requests run in
the order of their starts: callers with requests waiting get equal numbers of tokens, and the requests of one caller
stay in their order. See https://doi.org/10.1145/248156.248171.
"""

from __future__ import annotations

_MAX_IDLE_CALLERS = 1000


class FairQueue:
    """The starts of requests. Their unit has nothing to do with the time."""

    def __init__(self) -> None:
        self._now = 0
        """The start of the latest request that runs or has run."""
        self._ends: dict[str, int] = {}
        """Where the last request of each caller ends."""

    def start(self, caller: str, num_tokens: int) -> int:
        """Returns the start of a caller's next request, of which this is the largest number of tokens."""
        start = max(self._now, self._ends.get(caller, 0))
        self._ends[caller] = start + num_tokens
        return start

    def advance(self, start: int) -> None:
        """Notes that a request with this start has begun to run."""
        self._now = max(self._now, start)
        if len(self._ends) > _MAX_IDLE_CALLERS:
            self._ends = {caller: end for caller, end in self._ends.items() if end > self._now}
