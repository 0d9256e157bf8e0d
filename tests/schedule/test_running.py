"""Running sequences make way for one of higher priority, and for callers who run less than their share of the slots."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import example, given
from hypothesis import strategies as st
from scheduler_machine import request

from mpt_grpc.caller import Caller, Quota
from mpt_grpc.schedule.fair_queue import FairQueue
from mpt_grpc.schedule.running import Running
from mpt_grpc.schedule.sequence import Sequence

CALLERS = (Caller("one"), Caller("two"), Caller("heavy", quota=Quota(weight=3)))
NUM_SLOTS = 8
Arrivals = st.lists(st.tuples(st.sampled_from(CALLERS), st.integers(0, 1), st.integers(0, 30)), min_size=1, max_size=12)


def sequence_of(number: int, caller: Caller, priority: int, num_tokens: int = 0) -> Sequence:
    """Returns a sequence that has so many tokens of its output."""
    wanted = replace(request(f"{number}", priority=priority), caller=caller)
    sequence = Sequence(number, wanted, 0, (1,), max_context_tokens=100)
    for _ in range(num_tokens):
        sequence.append(5)
    return sequence


def expected(running: list[Sequence], head: Sequence, waiting: FairQueue) -> list[Sequence]:
    """Returns what the docstring of `preemptible_for` says, one sequence at a time."""
    preemptible: list[Sequence] = []
    weights = {s.request.caller.name: s.request.caller.quota.weight for s in (head, *running)}

    def runs_beyond_share(caller: Caller, num_more: int = 0) -> bool:
        number = sum(s.request.caller == caller and s not in equal for s in running) + num_more
        return number * sum(weights.values()) > NUM_SLOTS * caller.quota.weight

    equal: list[Sequence] = []
    may_share = not runs_beyond_share(head.request.caller, num_more=1)
    for s in sorted(running, key=lambda s: s.rank, reverse=True):
        caller = s.request.caller
        if s.request.priority < head.request.priority:
            preemptible.append(s)
        elif s.request.priority == head.request.priority and may_share:
            was_served_as_much = waiting.served(caller.name) >= waiting.served(head.request.caller.name)
            if was_served_as_much and runs_beyond_share(caller):
                equal.append(s)
                preemptible.append(s)
    return preemptible


@given(Arrivals, st.sets(st.integers(0, 11), max_size=4), st.sampled_from(CALLERS), st.integers(0, 2))
@example([(CALLERS[0], 0, 5)] * 7, set(), CALLERS[1], 0)
@example([(CALLERS[0], 0, 5)] * 4, set(), CALLERS[1], 0)  # exactly the share
@example([(CALLERS[0], 1, 5)] * 7, set(), CALLERS[1], 0)  # those beyond the share have a higher priority
def test_those_make_way_that_have_lower_priority_or_are_beyond_their_callers_share(
    arrivals: list[tuple[Caller, int, int]], left: set[int], caller: Caller, priority: int
) -> None:
    running, waiting = Running(NUM_SLOTS), FairQueue()
    sequences = [sequence_of(number, *arrival) for number, arrival in enumerate(arrivals)]
    for number, sequence in enumerate(sequences):
        waiting.add(sequence)
        waiting.start(sequence)
        running.add(sequence)
        if number in left or running.is_full:
            running.remove(sequence)
    head = sequence_of(len(arrivals), caller, priority)
    waiting.add(head)
    assert running.preemptible_for(head, waiting) == expected(running.sequences, head, waiting)


def test_a_sequence_that_does_not_run_is_not_counted() -> None:
    running = Running(NUM_SLOTS)
    first, second = (sequence_of(number, CALLERS[0], 0) for number in range(2))
    running.add(first)
    running.remove(second)
    running.remove(first)
    running.remove(first)
    assert running.sequences == []
    assert running.leaves_token_for(second, num_tokens=1)
