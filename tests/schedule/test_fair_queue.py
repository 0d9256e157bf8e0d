"""Callers share the server: one that sends many requests does not make another wait for all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from scheduler_machine import Machine, machine, request

from mpt_grpc.caller import Caller
from mpt_grpc.request import StoppingCriteria
from mpt_grpc.schedule.fair_queue import FairQueue


def add(m: Machine, name: str, caller: str, max_new_tokens: int = 8, priority: int = 0) -> None:
    stopping = StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True)
    prompt = (len(m.prompts) + 1,) * 5  # not in the prefix cache
    m.add(replace(request(name, priority=priority), stopping=stopping, caller=Caller(caller)), prompt)


def run(m: Machine, until: str) -> Counter[str]:
    """Runs until a request has ended; returns the tokens that the model computed for each caller."""
    tokens: Counter[str] = Counter()
    while until not in m.ended:
        plan = m.step()
        for s in plan.sequences:
            tokens[m.sequences[m.names[s.sequence_id]].request.caller.name] += len(s.token_ids)
    return tokens


def test_a_caller_with_many_requests_lets_another_go_first() -> None:
    m = machine(max_running=4)
    for number in range(50):
        add(m, f"flood{number}", "flood")
    m.step()
    add(m, "quick", "other")
    run(m, until="quick")
    assert len([name for name in m.ended if name.startswith("flood")]) <= 8, "those that ran, and no more"


def test_callers_with_many_requests_get_the_same_number_of_tokens() -> None:
    m = machine(max_running=4)
    for number in range(60):
        add(m, f"flood{number}", "flood", max_new_tokens=16)
    for number in range(40):
        add(m, f"other{number}", "other", max_new_tokens=8)
    run(m, until="other3")
    tokens = run(m, until="other39")
    assert 0.8 < tokens["flood"] / tokens["other"] < 1.25


def test_priority_comes_before_fairness() -> None:
    m = machine(max_running=1)
    for number in range(3):
        add(m, f"urgent{number}", "flood", priority=1)
    add(m, "quick", "other")
    run(m, until="quick")
    assert list(m.ended)[:3] == ["urgent0", "urgent1", "urgent2"]


def test_a_caller_who_was_idle_has_no_credit() -> None:
    m = machine(max_running=1)
    for number in range(20):
        add(m, f"early{number}", "busy")
        run(m, until=f"early{number}")
    for number in range(10):
        add(m, f"busy{number}", "busy")
        add(m, f"idle{number}", "idle")
    run(m, until="busy4")
    assert len([name for name in m.ended if name.startswith("idle")]) in (4, 5, 6)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100), st.booleans()), max_size=200))
def test_the_requests_of_each_caller_stay_in_their_order(arrivals: list[tuple[str, int, bool]]) -> None:
    queue, starts = FairQueue(), dict[str, list[int]]()
    for caller, num_tokens, runs in arrivals:
        starts.setdefault(caller, []).append(queue.start(caller, num_tokens))
        if runs:
            queue.advance(min(start for own in starts.values() for start in own))
    assert all(own == sorted(own) for own in starts.values())


def test_callers_who_are_idle_are_forgotten() -> None:
    queue = FairQueue()
    for number in range(1500):
        queue.advance(queue.start(f"caller {number}", 10))
        queue.advance(10 * number)
    assert queue.start("caller 1499", 1) > queue.start("caller 0", 1) - 30
    assert len(vars(queue)["_ends"]) <= 1001
