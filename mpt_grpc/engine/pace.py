"""When the new tokens of each output of a request are sent to its reader."""

from __future__ import annotations

import math
import time

from mpt_grpc.request import ChunkOptions
from mpt_grpc.results import TokenEvent


class Pace:
    """Decides when the new tokens of each output are sent."""

    def __init__(self, options: ChunkOptions) -> None:
        self._interval_s = math.inf if options.interval_s is None else options.interval_s
        self._num_tokens: float = options.num_tokens or (1 if options.interval_s is None else math.inf)
        self._held: dict[int, float] = {}
        """The number of events of an output since the last ones were sent; infinite at its end."""
        self._sent_s: dict[int, float] = {}

    def feed(self, event: TokenEvent) -> None:
        self._held[event.index] = self._held.get(event.index, 0) + 1 if event.finish is None else math.inf

    def due(self, *, has_failed: bool) -> list[int]:
        """Returns the outputs whose new tokens are to be sent now, in the order in which these came."""
        now_s = time.monotonic()
        due = [
            index
            for index, num_events in self._held.items()
            if has_failed
            or num_events >= self._num_tokens
            or now_s - self._sent_s.get(index, -math.inf) >= self._interval_s
        ]
        for index in due:
            del self._held[index]
            self._sent_s[index] = now_s
        return due
