"""Callers share the server: one that sends many requests does not make another wait for all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_machine import Machine, expected_output, machine, request

from mpt_grpc.caller import Caller, Quota
from mpt_grpc.request import StoppingCriteria
from mpt_grpc.schedule.fair_queue import FairQueue
from mpt_grpc.schedule.sequence import Sequence

ANY_TOKEN = tuple(range(50))


def add(
    m: Machine, name: str, caller: str, max_new_tokens: int = 8, priority: int = 0, weight: int = 1, **stopping: object
) -> None:
    criteria = StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True, **stopping)  # type: ignore[arg-type]
    prompt = (len(m.prompts) + 4,) * 5  # not in the prefix cache
    quota = Quota(weight=weight)
    m.add(replace(request(name, priority=priority), stopping=criteria, caller=Caller(caller, quota=quota)), prompt)


def run(m: Machine, until: str) -> Counter[str]:
    """Runs until a request has ended; returns the tokens that each caller was served."""
    tokens: Counter[str] = Counter()
    while until not in m.ended:
        tokens += step(m)
    return tokens


def step(m: Machine) -> Counter[str]:
    """Returns the tokens of prompts and outputs in a step by caller, without those that a preemption repeats."""
    before = served(m)
    m.step()
    return served(m) - before


def served(m: Machine) -> Counter[str]:
    tokens: Counter[str] = Counter()
    for name, sequence in m.sequences.items():
        num_tokens = len(m.prompts[name]) + len(m.outputs[name]) if m.outputs[name] else sequence.num_computed
        tokens[sequence.request.caller.name] += num_tokens
    return tokens


def test_a_caller_with_many_requests_lets_another_start_at_once() -> None:
    m = machine(max_running=4)
    for number in range(50):
        add(m, f"flood{number}", "flood", max_new_tokens=30)
    m.step()
    add(m, "quick", "other")
    assert "quick" in m.planned(m.step())
    run(m, until="quick")
    assert not m.ended.keys() - {"quick"}
    m.finish()
    flood = m.outputs["flood3"]  # it was preempted
    assert m.sequences["flood3"].num_preemptions == 1
    assert flood == expected_without_eos(m.prompts["flood3"], 30)


def expected_without_eos(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    output: list[int] = []
    while len(output) < num_tokens:
        output += expected_output(prompt + tuple(output), num_tokens - len(output), 1000)
    return output


def test_a_caller_takes_no_more_slots_from_others_than_its_share() -> None:
    m = machine(max_running=4)
    for number in range(4):
        add(m, f"first{number}", "first", max_new_tokens=30)
    m.step()
    for number in range(4):
        add(m, f"second{number}", "second", max_new_tokens=2)
    m.step()
    assert sum(sequence.num_preemptions for sequence in m.sequences.values()) <= 2
    m.finish()


def test_callers_with_many_requests_get_the_same_number_of_tokens() -> None:
    m = machine(max_running=4)
    for number in range(60):
        add(m, f"flood{number}", "flood", max_new_tokens=16)
    for number in range(40):
        add(m, f"other{number}", "other", max_new_tokens=8)
    run(m, until="other3")
    tokens = run(m, until="other39")
    assert 0.8 < tokens["flood"] / tokens["other"] < 1.25


def test_tokens_that_a_request_could_have_had_do_not_count() -> None:
    m = machine(max_running=2)
    for number in range(60):
        add(m, f"exact{number}", "exact", max_new_tokens=10)
        add(m, f"brief{number}", "brief", max_new_tokens=100, stop_token_ids=ANY_TOKEN)
    tokens = run(m, until="brief59")
    assert 0.8 < tokens["exact"] / tokens["brief"] < 1.25


def test_callers_get_tokens_by_their_weight() -> None:
    m = machine(max_running=4)
    for number in range(80):
        add(m, f"heavy{number}", "heavy", weight=3)
        add(m, f"light{number}", "light")
    tokens = run(m, until="heavy79")
    assert 2.5 < tokens["heavy"] / tokens["light"] < 3.5


def beside(num_others: int, other_tokens: int, num_own: int) -> tuple[Counter[str], list[int]]:
    """Returns the tokens of a caller with `num_own` requests in progress at any time, of another one with `num_others`
    and of both, and for how many steps each of the former's requests waited for its first token.

    Every third may have many more tokens than it gets.
    """
    m = machine(num_blocks=400)
    tokens: Counter[str] = Counter()
    arrivals: dict[str, int] = {}
    waits: dict[str, int] = {}
    for number in range(400):
        active = Counter(s.request.caller.name for name, s in m.sequences.items() if name not in m.ended)
        for _ in range(num_others - active["other"]):
            add(m, f"other{len(m.sequences)}", "other", other_tokens)
        for _ in range(num_own - active["own"]):
            is_brief = len(arrivals) % 3 == 0
            arrivals[name := f"own{len(m.sequences)}"] = number
            add(m, name, "own", 90 if is_brief else 12, stop_token_ids=ANY_TOKEN if is_brief else ())
        tokens += step(m)
        for name in arrivals.keys() - waits.keys():
            if m.outputs[name]:
                waits[name] = number - arrivals[name] + 1
    return tokens, [waits[name] for name in arrivals if name in waits]


@pytest.mark.parametrize("other_tokens", [8, 60])
@pytest.mark.parametrize("num_own", [1, 2, 3, 4, 8])
def test_a_flood_costs_another_at_most_a_quarter_of_its_share(num_own: int, other_tokens: int) -> None:
    alone, waits_alone = beside(1, other_tokens, num_own)
    tokens, waits = beside(500, other_tokens, num_own)
    assert tokens["own"] >= 0.75 * min(alone["own"], tokens.total() / 2)
    if num_own < 4:  # of 8 slots: it wants less than its share
        assert fmean(waits) <= 2 * fmean(waits_alone)


def test_a_second_request_does_not_wait_for_tokens_that_the_first_could_have_had() -> None:
    m = machine(max_running=4)
    for number in range(50):
        add(m, f"flood{number}", "flood")
    m.step()
    add(m, "first", "other", max_new_tokens=90)
    for _ in range(5):
        m.step()
    add(m, "second", "other")
    assert {"first", "second"} <= set(m.planned(m.step()))


@given(
    st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=30),
    st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 5),
)
def test_while_two_callers_wait_neither_is_served_much_more(
    first: list[tuple[int, bool]], second: list[tuple[int, bool]], max_running: int
) -> None:
    m = machine(max_running=max_running)
    requests = {"first": first, "second": second}
    for caller, own in requests.items():
        for number, (max_new_tokens, is_brief) in enumerate(own):
            stops = ANY_TOKEN if is_brief else ()
            add(m, f"{caller}{number}", caller, max_new_tokens, stop_token_ids=stops)
    tokens: Counter[str] = Counter()
    while all(any(s.num_cached_tokens is None for s in waiting(m, caller)) for caller in requests):
        tokens += step(m)
        most = max_running * (5 + 20) * 2  # what runs has been charged and not been served
        assert abs(tokens["first"] - tokens["second"]) <= most
        for caller in requests:
            has_run = [s.num_cached_tokens is not None for s in waiting(m, caller)]
            assert has_run == sorted(has_run, reverse=True), "the requests of a caller start in their order"
    m.finish()


def waiting(m: Machine, caller: str) -> list[Sequence]:
    """Returns a caller's sequences, of which those that wait for the first time have no cached tokens."""
    return [sequence for sequence in m.sequences.values() if sequence.request.caller.name == caller]


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


@pytest.mark.parametrize("is_early", [True, False])
def test_what_another_was_charged_for_and_did_not_get_does_not_delay_who_comes_later(is_early: bool) -> None:
    m = machine(max_running=8)
    large = [f"large{number}" for number in range(8)]
    for name in large:
        add(m, name, "flood", max_new_tokens=1000)
    for number in range(60):
        add(m, f"small{number}", "flood")
    m.step()
    if is_early:
        for name in large:
            m.end(name)
        m.step()
    for number in range(10):
        add(m, f"other{number}", "other")
    for name in large:
        m.end(name)
    tokens = run(m, until="other9")
    assert tokens["flood"] < 2 * tokens["other"]


def test_what_urgent_callers_were_served_does_not_delay_who_comes_later() -> None:
    m = machine(max_running=1)
    for number in range(20):
        add(m, f"urgent{number}", "urgent", priority=1)
        add(m, f"flood{number}", "flood")
    run(m, until="urgent18")
    for number in range(20):
        add(m, f"other{number}", "other")
    tokens = run(m, until="other4")
    assert tokens["flood"] < 2 * tokens["other"]


def test_a_caller_who_waits_at_a_lower_priority_gives_others_no_credit() -> None:
    m = machine(max_running=1)
    for number in range(20):
        add(m, f"early{number}", "early")
    add(m, "low", "low", priority=-1)
    run(m, until="early18")
    for number in range(20):
        add(m, f"other{number}", "other")
        add(m, f"late{number}", "early")
    tokens = run(m, until="late4")
    assert tokens["other"] < 2 * tokens["early"]


def test_callers_who_are_idle_are_forgotten() -> None:
    queue = FairQueue()
    for number in range(1500):
        wanted = replace(request(f"{number}"), caller=Caller(f"caller {number}"))
        sequence = Sequence(number, wanted, 0, (1,), max_context_tokens=100)
        queue.add(sequence)
        queue.start(sequence)
        queue.end(sequence)
    assert len(vars(queue)["_offsets"]) <= 1001


def test_a_caller_who_is_idle_keeps_what_it_was_served() -> None:
    def sequence_of(number: int, caller: str) -> Sequence:
        return Sequence(number, replace(request(f"{number}"), caller=Caller(caller)), 0, (1,), max_context_tokens=100)

    queue = FairQueue()
    for number, caller in enumerate(("idle", "other")):
        sequence = sequence_of(number, caller)
        queue.add(sequence)
        queue.start(sequence)
        sequence.append(5)
        queue.end(sequence)
    new, again = sequence_of(3, "new"), sequence_of(2, "idle")
    queue.add(new)
    queue.add(again)
    assert queue.first is new
