"""Callers share the tokens of a step, so that the prompts of one do not delay those of another."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_machine import Machine, machine, request

from mpt_grpc.caller import Caller, Quota
from mpt_grpc.request import StoppingCriteria

Lengths = st.integers(2, 120)


def add(m: Machine, name: str, caller: Caller, num_prompt_tokens: int, max_new_tokens: int, priority: int = 0) -> None:
    number = len(m.prompts)
    prompt = (4, number // 90 + 4, number % 90 + 4, *range(5, 5 + num_prompt_tokens))[:num_prompt_tokens]
    if num_prompt_tokens < 3:
        prompt = (number + 4,) * num_prompt_tokens
    stopping = StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True)
    m.add(replace(request(name, priority=priority), stopping=stopping, caller=caller), prompt)


def num_steps_until_the_first_token(
    num_others: int, prompts: list[int], max_new_tokens: int, num_prompt_tokens: int, num_before: int
) -> int:
    """Returns for how many steps a caller waits who comes after `num_before` steps of another's requests."""
    m = machine(2000, max_running=8, max_step_tokens=32, max_context=400)
    for number in range(num_others):
        add(m, f"other{number}", Caller("other"), prompts[number % len(prompts)], max_new_tokens)
    for _ in range(num_before):
        m.step()
    add(m, "small", Caller("small"), num_prompt_tokens, 4)
    num_steps = 0
    while not m.outputs["small"]:
        m.step()
        num_steps += 1
    return num_steps


@settings(deadline=None, max_examples=25)
@given(st.lists(Lengths, min_size=1, max_size=5), st.integers(60, 200), Lengths, st.integers(1, 60))
def test_a_flood_doubles_the_steps_to_anothers_first_token_at_most(
    prompts: list[int], max_new_tokens: int, num_prompt_tokens: int, num_before: int
) -> None:
    neighbours = num_steps_until_the_first_token(1, prompts, max_new_tokens, num_prompt_tokens, num_before)
    flood = num_steps_until_the_first_token(500, prompts, max_new_tokens, num_prompt_tokens, num_before)
    assert flood <= 2 * neighbours + 1  # a share of the last step may be left over


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1), Lengths), min_size=1, max_size=8), st.booleans())
def test_a_step_is_full_and_leaves_no_running_sequence_out(
    arrivals: list[tuple[str, int, int]],
    has_weights: bool,
) -> None:
    m = machine(2000, max_running=8, max_step_tokens=16, max_context=400)
    for number, (caller, priority, length) in enumerate(arrivals):
        weight = ord(caller) - 96 if has_weights else 1
        add(m, f"{number}", Caller(caller, quota=Quota(weight=weight)), length, 3, priority)
    while m.scheduler.has_work:
        known = sum(len(m.prompts[name]) + len(m.outputs[name]) for name in m.prompts if name not in m.ended)
        left = known - sum(s.num_computed for name, s in m.sequences.items() if name not in m.ended)
        assert m.step().num_tokens == min(16, left)  # the machine checks that each gets one


@pytest.mark.parametrize(("weight", "share"), [(1, 16), (3, 24)])
def test_two_prompts_share_the_steps_by_the_weights_of_their_callers(weight: int, share: int) -> None:
    m = machine(200, max_running=8, max_step_tokens=32, max_context=400)
    for number in range(3):
        add(m, f"flood{number}", Caller("flood"), 100, 4)
    m.step()
    add(m, "other", Caller("other", quota=Quota(weight=weight)), 100, 4)
    num_tokens = {m.names[s.sequence_id]: len(s.token_ids) for s in m.step().sequences}
    assert num_tokens == {"flood0": 32 - share, "other": share}


def test_prompts_of_one_caller_are_computed_one_after_the_other() -> None:
    m = machine(200, max_running=8, max_step_tokens=32, max_context=400)
    for number in range(3):
        add(m, f"{number}", Caller("one"), 64, 4)
    for number in range(3):
        assert m.planned(m.step())[-1] == f"{number}"
        m.step()


def test_a_prompt_of_higher_priority_comes_before_those_of_all_callers() -> None:
    m = machine(200, max_running=8, max_step_tokens=32, max_context=400)
    add(m, "low", Caller("one"), 100, 4)
    m.step()
    add(m, "high", Caller("two"), 100, 4, priority=1)
    num_tokens = {m.names[s.sequence_id]: len(s.token_ids) for s in m.step().sequences}
    assert num_tokens == {"high": 31, "low": 1}


def test_a_caller_starts_though_another_fills_batch_and_steps() -> None:
    m = machine(200, max_running=8, max_step_tokens=8, max_context=400)
    for number in range(20):
        add(m, f"flood{number}", Caller("flood"), 2, 200)
    for _ in range(20):
        m.step()
    add(m, "other", Caller("other"), 2, 4)
    assert "other" in m.planned(m.step())
    assert m.scheduler.num_running == 8
