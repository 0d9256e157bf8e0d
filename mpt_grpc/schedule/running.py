"""The running sequences, and which of them make way for another one.

Callers are counted as their sequences start and leave, so a step in which none makes way looks at callers only.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from operator import attrgetter

from mpt_grpc.caller import Caller
from mpt_grpc.schedule.fair_queue import FairQueue
from mpt_grpc.schedule.sequence import Sequence
from mpt_grpc.schedule.shares import shares

_rank = attrgetter("rank")


class Running:
    """The sequences that have one of `num_slots` slots, by rank."""

    def __init__(self, num_slots: int) -> None:
        self.sequences: list[Sequence] = []
        """By rank; only `add` and `remove` change it."""
        self._num_slots = num_slots
        self._num_of: Counter[str] = Counter()
        self._callers: dict[str, Caller] = {}
        """The number of running sequences of each caller, and the caller, by its name; without those that run none."""

    @property
    def is_full(self) -> bool:
        return len(self.sequences) == self._num_slots

    def add(self, sequence: Sequence) -> None:
        """Gives a sequence a slot; one must be free."""
        caller = sequence.request.caller
        insort(self.sequences, sequence, key=_rank)
        self._num_of[caller.name] += 1
        self._callers[caller.name] = caller

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence's slot; has no effect if it does not run."""
        if sequence not in self.sequences:
            return
        name = sequence.request.caller.name
        self.sequences.remove(sequence)
        self._num_of[name] -= 1
        if not self._num_of[name]:
            del self._num_of[name], self._callers[name]

    def leaves_token_for(self, head: Sequence, num_tokens: int) -> bool:
        """Whether `head`, which waits, has a share of `num_tokens`; if the batch is full, in another's place."""
        by_rank = list(self.sequences)
        insort(by_rank, head, key=_rank)
        return shares(by_rank, num_tokens + self.is_full, head)[head] > 0

    def preemptible_for(self, head: Sequence, waiting: FairQueue) -> list[Sequence]:
        """Returns the running sequences that must make way for `head`, which waits, in their order.

        They are those of lower priority, and, if its caller runs fewer than its share, of the same priority those that
        other callers, who have been served as much or more, run beyond theirs.
        """
        priority = head.request.priority
        num_beyond = self._num_beyond_shares(head.request.caller, waiting)
        preemptible = []
        for s in reversed(self.sequences):
            name = s.request.caller.name
            if s.request.priority < priority:
                preemptible.append(s)
            elif s.request.priority > priority or not num_beyond:
                break
            elif name in num_beyond:
                num_beyond[name] -= 1
                if not num_beyond[name]:
                    del num_beyond[name]
                preemptible.append(s)
        return preemptible

    def _num_beyond_shares(self, caller: Caller, waiting: FairQueue) -> dict[str, int]:
        """Returns the numbers of sequences beyond their shares of others who were served as much as `caller`.

        There are none if `caller` runs its share.
        """
        callers = {caller.name: caller, **self._callers}.values()
        slots_per_weight = self._num_slots / sum(other.quota.weight for other in callers)
        if self._num_of[caller.name] + 1 > slots_per_weight * caller.quota.weight:
            return {}
        served = waiting.served(caller.name)
        num_beyond = {
            other.name: self._num_of[other.name] - math.floor(slots_per_weight * other.quota.weight)
            for other in callers
            if waiting.served(other.name) >= served
        }
        return {name: number for name, number in num_beyond.items() if number > 0}
