"""How long requests wait and run, as measured lately."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from mpt_grpc.results import RequestStats

_WEIGHT = 0.05
"""The weight of a new measurement in a mean."""
_NUM_NEEDED = 8
"""The number of measurements from which on they are used: the first steps of a process are slow."""
_NUM_KEPT = 64
_MAX_FACTOR = 8.0
"""The most that a step counts, in units of the mean: it may have had to wait for a core, or for a long prompt."""


@dataclass(frozen=True)
class RunTime:
    """How long a request runs at least."""

    prefill_s: float
    """The time to its first token."""
    token_s: float
    """The time for each token that an output may get."""

    def seconds(self, num_new_tokens: int | None) -> float:
        """Returns the time of a request whose outputs may get `num_new_tokens` each; None is not known."""
        return self.prefill_s + self.token_s * (num_new_tokens or 0)


class ServiceTimes:
    """The times of the last requests; estimates are 0 before several have ended.

    How much of what it may have a request needs is estimated by those that needed least, since nobody knows it.
    """

    def __init__(self) -> None:
        self._run_s = 0.0
        self._prefill_s: deque[float] = deque(maxlen=_NUM_KEPT)
        self._used: deque[float] = deque(maxlen=_NUM_KEPT)
        """The fraction of the tokens that a request could have that it got."""
        self._num_measured = 0
        self._token_s = 0.0
        """The time of a step for each token that it gives an output. It is that of requests that end too late as well,
        unlike the time from begin to end."""
        self._num_steps = 0

    def record(self, stats: RequestStats, num_sequences: int, num_new_tokens: int, *, was_cancelled: bool) -> None:
        """Adds a request that has ended, and of which each of `num_sequences` outputs could get `num_new_tokens`.

        One that was cancelled shows how long others waited for it, but not how long it would have taken.
        """
        if stats.scheduled_time_s is None:
            return
        self._num_measured += 1
        self._run_s += _weight(self._num_measured) * (stats.end_time_s - stats.scheduled_time_s - self._run_s)
        if stats.first_token_time_s is None or was_cancelled:
            return
        self._prefill_s.append(stats.first_token_time_s - stats.scheduled_time_s)
        self._used.append(stats.num_output_tokens / max(1, num_new_tokens * num_sequences))

    def record_step(self, duration_s: float, num_tokens: float) -> None:
        """Adds a step that has given each output `num_tokens` on average."""
        token_s = duration_s / num_tokens
        if self._num_steps:
            token_s = min(token_s, _MAX_FACTOR * self._token_s)
        self._num_steps += 1
        self._token_s += _weight(self._num_steps) * (token_s - self._token_s)

    def run_time(self) -> RunTime:
        """Returns how long a request runs at least; it sorts the last times."""
        if len(self._used) < _NUM_NEEDED:
            return RunTime(0.0, 0.0)
        return RunTime(_low(self._prefill_s), _low(self._used) * self._token_s)

    def wait_s(self, num_ahead: float, num_running: int) -> float:
        """Returns how long it takes until `num_ahead` sequences have made way, of which `num_running` run at once."""
        return self._run_s * max(0, num_ahead) / max(1, num_running) if self._num_measured >= _NUM_NEEDED else 0.0


def _weight(num_measured: int) -> float:
    """Returns the weight of the last measurement."""
    return max(_WEIGHT, 1 / num_measured)


def _low(values: Iterable[float]) -> float:
    """Returns the value below which a tenth of them are."""
    ordered = sorted(values)
    return ordered[len(ordered) // 10]
