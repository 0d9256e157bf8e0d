"""How long requests run, as measured lately, and by that when a new one would start and end."""

from __future__ import annotations

from mpt_grpc.request import RequestStats

_WEIGHT = 0.05
"""The weight of a new measurement in a mean."""
_NUM_NEEDED = 8
"""The number of measurements from which on the means are used: the first steps of a process are slow."""


class ServiceTimes:
    """Means over the last requests; estimates are 0 before several have ended."""

    def __init__(self) -> None:
        self._run_s = self._token_s = 0.0
        self._used = 1.0
        """The share of `max_new_tokens` that requests generate."""
        self._num_measured = 0

    def record(self, stats: RequestStats, max_new_tokens: int) -> None:
        """Adds a request that has ended by itself."""
        if stats.scheduled_time_s is None or not stats.num_output_tokens:
            return
        run_s = stats.end_time_s - stats.scheduled_time_s
        self._num_measured += 1
        weight = max(_WEIGHT, 1 / self._num_measured)
        self._run_s += weight * (run_s - self._run_s)
        self._token_s += weight * (run_s / stats.num_output_tokens - self._token_s)
        self._used += weight * (stats.num_output_tokens / max_new_tokens - self._used)

    def run_s(self, max_new_tokens: int | None) -> float:
        """Returns how long a request runs that generates up to `max_new_tokens`; None is not known."""
        if self._num_measured < _NUM_NEEDED:
            return 0.0
        return self._run_s if max_new_tokens is None else self._token_s * self._used * max_new_tokens

    def wait_s(self, num_ahead: int, num_running: int) -> float:
        """Returns how long it takes until `num_ahead` sequences have started, of which `num_running` run at once."""
        return self.run_s(None) * num_ahead / max(1, num_running)
