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
        self._prefill_s = self._decode_s = self._num_new_tokens = 0.0
        self._num_measured = 0

    def record(self, stats: RequestStats, num_new_tokens: int) -> None:
        """Adds a request that has ended by itself, and of which each output could get `num_new_tokens`."""
        if stats.scheduled_time_s is None or stats.first_token_time_s is None:
            return
        self._num_measured += 1
        weight = max(_WEIGHT, 1 / self._num_measured)
        self._prefill_s += weight * (stats.first_token_time_s - stats.scheduled_time_s - self._prefill_s)
        self._decode_s += weight * (stats.end_time_s - stats.first_token_time_s - self._decode_s)
        self._num_new_tokens += weight * (num_new_tokens - self._num_new_tokens)

    def run_s(self, num_new_tokens: int | None) -> float:
        """Returns how long a request runs whose outputs may get `num_new_tokens` each; None is not known."""
        if self._num_measured < _NUM_NEEDED:
            return 0.0
        share = 1.0 if num_new_tokens is None else num_new_tokens / self._num_new_tokens
        return self._prefill_s + self._decode_s * share

    def wait_s(self, num_ahead: int, num_running: int) -> float:
        """Returns how long it takes until `num_ahead` sequences have started, of which `num_running` run at once."""
        return self.run_s(None) * num_ahead / max(1, num_running)
