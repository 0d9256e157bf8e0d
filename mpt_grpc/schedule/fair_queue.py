"""The waiting sequences, in an order in which no caller waits for all that another one has sent.

The next one is of the highest priority, and among these of the caller that has been served the fewest tokens, by its
weight: callers with sequences waiting get the same numbers of tokens, and those of one caller stay in their order. A
caller is charged for all tokens that a sequence may have when it starts, and gets those back that it did not have. A
caller who was idle begins with the tokens that the least served of those who wait at its priority has had, without
those that it may get back. See the virtual token counter of https://arxiv.org/abs/2401.00588.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from mpt_grpc.caller import Caller
from mpt_grpc.schedule.sequence import Sequence

_MAX_IDLE_CALLERS = 1000
_sequence_id = attrgetter("sequence_id")


class FairQueue:
    """The sequences that wait, and what their callers have been served. Its unit has nothing to do with the time."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[str, list[Sequence]]] = {}
        """By priority and caller, in the order of arrival; without empty lists."""
        self._served: dict[str, float] = {}
        """The tokens of each caller, and those that its started sequences may get, divided by its weight."""
        self._started: dict[str, set[Sequence]] = {}
        """Those that have started and not ended, by caller; without empty sets."""
        self._now = 0.0
        """The most tokens that a caller has had when one of its sequences has started. A caller that arrives when none
        waits begins there."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Adds a sequence that has arrived or was preempted."""
        caller = sequence.request.caller.name
        if not any(caller in callers for callers in self._waiting.values()):
            self._served[caller] = max(self._served.get(caller, 0.0), self._level(sequence.request.priority))
        callers = self._waiting.setdefault(sequence.request.priority, {})
        insort(callers.setdefault(caller, []), sequence, key=_sequence_id)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence; has no effect if it does not wait."""
        priority, caller = sequence.request.priority, sequence.request.caller.name
        callers = self._waiting.get(priority, {})
        if sequence not in (queue := callers.get(caller, [])):
            return
        queue.remove(sequence)
        if not queue:
            del callers[caller]
        if not callers:
            del self._waiting[priority]

    @property
    def first(self) -> Sequence:
        """The sequence that is to start next. There must be one."""
        callers = self._waiting[max(self._waiting)]
        return min((queue[0] for queue in callers.values()), key=self._order)

    def _order(self, sequence: Sequence) -> tuple[float, int]:
        return self._served[sequence.request.caller.name], sequence.sequence_id

    def start(self, sequence: Sequence) -> None:
        """Removes a sequence because it starts to run, and charges its caller unless it has run before."""
        caller = sequence.request.caller
        self.remove(sequence)
        self._now = max(self._now, self._had(caller.name))
        started = self._started.setdefault(caller.name, set())
        if sequence not in started:
            started.add(sequence)
            prompt = 0 if sequence.primary else sequence.num_prompt_tokens
            self._served[caller.name] += (prompt + sequence.num_remaining) / caller.quota.weight
        if len(self._served) > _MAX_IDLE_CALLERS:
            busy = {*self._started, *(name for callers in self._waiting.values() for name in callers)}
            self._served = {name: self._served[name] for name in busy}

    def end(self, sequence: Sequence) -> None:
        """Removes a sequence that has ended, and gives back what it was charged for and did not get."""
        caller = sequence.request.caller
        self.remove(sequence)
        started = self._started.get(caller.name, set())
        if sequence not in started:
            return
        started.remove(sequence)
        if not started:
            del self._started[caller.name]
        self._served[caller.name] -= sequence.num_remaining / caller.quota.weight

    def served(self, caller: Caller) -> float:
        """Returns how many tokens a caller with sequences has been served or may get, by its weight."""
        return self._served[caller.name]

    def _level(self, priority: int) -> float:
        """Returns what a caller that was idle begins with."""
        return min(map(self._had, self._waiting.get(priority, ())), default=self._now)

    def _had(self, caller: str) -> float:
        """Returns how many tokens a caller has had, by its weight."""
        pending = sum(s.num_remaining / s.request.caller.quota.weight for s in self._started.get(caller, ()))
        return self._served[caller] - pending
