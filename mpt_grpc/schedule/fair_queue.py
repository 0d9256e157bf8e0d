"""The waiting sequences, in an order in which no caller waits for all that another one has sent.

Among the sequences of the highest priority, the next is one of the caller that has been served the fewest tokens,
divided by its weight. So callers with waiting sequences get equal numbers of tokens, and the sequences of one caller
stay in order. A token counts once it has been computed: nobody waits because of tokens that a request could have had. A
caller without waiting sequences begins with the number of the least served caller that waits at its priority. This is
the virtual token counter of https://arxiv.org/abs/2401.00588.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from mpt_grpc.schedule.sequence import Sequence

_MAX_IDLE_CALLERS = 1000
_sequence_id = attrgetter("sequence_id")


class FairQueue:
    """The sequences that wait, and what their callers have been served. Its unit has nothing to do with the time."""

    def __init__(self) -> None:
        self._waiting: dict[int, dict[str, list[Sequence]]] = {}
        """By priority and caller, in the order of arrival; without empty lists."""
        self._offsets: dict[str, float] = {}
        """What each caller has been served, without its started sequences."""
        self._started: dict[str, set[Sequence]] = {}
        """The sequences that have started and not ended, by caller; without empty sets."""
        self._now = 0.0
        """The most that a caller had been served when one of its sequences started. A caller that arrives when none
        waits begins there."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Adds a sequence that has arrived or was preempted."""
        name = sequence.request.caller.name
        if not any(name in callers for callers in self._waiting.values()):
            level = self._level(sequence.request.priority) - self._cost_of_started(name)
            self._offsets[name] = max(self._offsets.get(name, level), level)
        callers = self._waiting.setdefault(sequence.request.priority, {})
        insort(callers.setdefault(name, []), sequence, key=_sequence_id)

    @property
    def first(self) -> Sequence:
        """The sequence that is to start next. There must be one."""
        callers = self._waiting[max(self._waiting)]
        return min((queue[0] for queue in callers.values()), key=self._order)

    def _order(self, sequence: Sequence) -> tuple[float, int, int]:
        name = sequence.request.caller.name
        return self.served(name), len(self._started.get(name, ())), sequence.sequence_id

    def start(self, sequence: Sequence) -> None:
        """Removes a sequence because it starts to run."""
        name = sequence.request.caller.name
        self._remove(sequence)
        self._now = max(self._now, self.served(name))
        self._started.setdefault(name, set()).add(sequence)
        if len(self._offsets) > _MAX_IDLE_CALLERS:
            busy = set(self._started).union(*self._waiting.values())
            self._offsets = {name: self._offsets[name] for name in busy}

    def end(self, sequence: Sequence) -> None:
        """Removes a sequence that has ended."""
        name = sequence.request.caller.name
        self._remove(sequence)
        if sequence not in (started := self._started.get(name, set())):
            return
        started.remove(sequence)
        if not started:
            del self._started[name]
        self._offsets[name] += _cost(sequence)

    def served(self, name: str) -> float:
        """Returns the number of tokens that the caller of this name has been served, divided by its weight."""
        return self._offsets[name] + self._cost_of_started(name)

    def _remove(self, sequence: Sequence) -> None:
        """Removes a sequence; has no effect if it does not wait."""
        priority, name = sequence.request.priority, sequence.request.caller.name
        callers = self._waiting.get(priority, {})
        if sequence not in (queue := callers.get(name, [])):
            return
        queue.remove(sequence)
        if not queue:
            del callers[name]
        if not callers:
            del self._waiting[priority]

    def _cost_of_started(self, name: str) -> float:
        return sum(map(_cost, self._started.get(name, ())))

    def _level(self, priority: int) -> float:
        """Returns the number with which a caller that was idle begins."""
        return min(map(self.served, self._waiting.get(priority, ())), default=self._now)


def _cost(sequence: Sequence) -> float:
    """Returns the tokens of a sequence that has started, once they have been computed or chosen, by weight."""
    num_tokens = len(sequence.token_ids) if sequence.num_output_tokens else sequence.num_computed
    if sequence.primary is not None:
        num_tokens = max(0, num_tokens - sequence.num_prompt_tokens)
    return num_tokens / sequence.request.caller.quota.weight
