"""How long requests run, as measured lately, and by that when a new one would start and end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from mpt_grpc.results import RequestStats

_WEIGHT = 0.05
"""The weight of a new measurement in a mean."""
_NUM_NEEDED = 8
"""The number of measurements from which on they are used: the first steps of a process are slow."""
_NUM_KEPT = 64


class ServiceTimes:
    """The times of the last requests; estimates are 0 before several have ended.

    How long a request runs is estimated by the quickest ones, since nobody knows how much of what it may have it needs.
    """

    def __init__(self) -> None:
        self._run_s = 0.0
        self._prefill_s: deque[float] = deque(maxlen=_NUM_KEPT)
        self._token_s: deque[float] = deque(maxlen=_NUM_KEPT)
        """The time to decode, divided by the number of tokens that the request could have."""
        self._num_measured = 0

    def record(self, stats: RequestStats, num_new_tokens: int) -> None:
        """Adds a request that has ended by itself, and of which each output could get `num_new_tokens`."""
        if stats.scheduled_time_s is None or stats.first_token_time_s is None:
            return
        self._num_measured += 1
        weight = max(_WEIGHT, 1 / self._num_measured)
        self._run_s += weight * (stats.end_time_s - stats.scheduled_time_s - self._run_s)
        self._prefill_s.append(stats.first_token_time_s - stats.scheduled_time_s)
        self._token_s.append((stats.end_time_s - stats.first_token_time_s) / max(1, num_new_tokens))

    def run_s(self, num_new_tokens: int | None) -> float:
        """Returns how long a request runs at least whose outputs may get `num_new_tokens` each; None is not known."""
        if self._num_measured < _NUM_NEEDED:
            return 0.0
        return _low(self._prefill_s) + _low(self._token_s) * (num_new_tokens or 0)

    def wait_s(self, num_ahead: int, num_running: int) -> float:
        """Returns how long it takes until `num_ahead` sequences have started, of which `num_running` run at once."""
        return self._run_s * num_ahead / max(1, num_running) if self._num_measured >= _NUM_NEEDED else 0.0


def _low(times_s: Iterable[float]) -> float:
    """Returns the time below which a tenth of them are."""
    ordered = sorted(times_s)
    return ordered[len(ordered) // 10]
