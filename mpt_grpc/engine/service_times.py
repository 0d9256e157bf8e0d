"""How long requests run, as measured lately, and by that when a new one would start and end."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from mpt_grpc.request import GenerationRequest
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

    def record(self, stats: RequestStats, num_new_tokens: int, *, was_cancelled: bool) -> None:
        """Adds a request that has ended, and of which each output could get `num_new_tokens`.

        One that was cancelled shows how long others waited for it, but not how long it would have taken.
        """
        if stats.scheduled_time_s is None:
            return
        self._num_measured += 1
        weight = max(_WEIGHT, 1 / self._num_measured)
        self._run_s += weight * (stats.end_time_s - stats.scheduled_time_s - self._run_s)
        if stats.first_token_time_s is None or was_cancelled:
            return
        self._prefill_s.append(stats.first_token_time_s - stats.scheduled_time_s)
        self._token_s.append((stats.end_time_s - stats.first_token_time_s) / max(1, num_new_tokens))

    def run_s(self, num_new_tokens: int | None) -> float:
        """Returns how long a request runs at least whose outputs may get `num_new_tokens` each; None is not known."""
        if len(self._token_s) < _NUM_NEEDED:
            return 0.0
        return _low(self._prefill_s) + _low(self._token_s) * (num_new_tokens or 0)

    def wait_s(self, num_ahead: float, num_running: int) -> float:
        """Returns how long it takes until `num_ahead` sequences have made way, of which `num_running` run at once."""
        return self._run_s * max(0, num_ahead) / max(1, num_running) if self._num_measured >= _NUM_NEEDED else 0.0


def num_ahead(request: GenerationRequest, others: Iterable[GenerationRequest]) -> float:
    """Returns how many sequences of the requests in flight run or start before those of a new one.

    The callers of one priority take turns by weight, as `FairQueue` has it for sequences that are equally long.
    """
    caller = request.caller
    num_urgent, num_of, weights = 0, Counter[str](), {caller.name: caller.quota.weight}
    for other in others:
        if other.priority > request.priority:
            num_urgent += other.sampling.num_sequences
        elif other.priority == request.priority:
            num_of[other.caller.name] += other.sampling.num_sequences
            weights[other.caller.name] = other.caller.quota.weight
    num_own = num_of.pop(caller.name, 0)
    num_turns = (num_own + 1) / caller.quota.weight
    return num_urgent + num_own + sum(min(number, num_turns * weights[name]) for name, number in num_of.items())


def _low(times_s: Iterable[float]) -> float:
    """Returns the time below which a tenth of them are."""
    ordered = sorted(times_s)
    return ordered[len(ordered) // 10]
