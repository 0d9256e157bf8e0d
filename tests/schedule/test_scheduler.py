"""The scheduler, run against a simulated model: see `scheduler_machine.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_machine import BLOCK_SIZE, EOS, Machine, expected_output, logprob_of, machine, request

from mpt_grpc.errors import FieldViolation, InvalidRequestError
from mpt_grpc.request import (
    DecodingOptions,
    GenerationRequest,
    LogprobOptions,
    RepetitionGuard,
    SamplingParameters,
    StoppingCriteria,
    sequence_seed,
)
from mpt_grpc.results import Finish, FinishReason, TokenEvent
from mpt_grpc.schedule.block_pool import BlockPool
from mpt_grpc.schedule.scheduler import Scheduler, SchedulerLimits
from mpt_grpc.step import Matcher, SamplingInputs, StepResult


@dataclass(frozen=True)
class Arrival:
    """A request and how it ends."""

    prompt_family: int
    prompt_length: int
    max_new_tokens: int
    num_sequences: int
    num_resumed: int
    priority: int
    salt: str
    bypass: bool
    scores_prompt: bool
    steps_before: int
    fate: str


arrivals = st.builds(
    Arrival,
    prompt_family=st.integers(0, 2),
    prompt_length=st.integers(1, 40),
    max_new_tokens=st.integers(0, 30),
    num_sequences=st.sampled_from([1, 1, 1, 2, 4]),
    num_resumed=st.sampled_from([0, 0, 0, 1, 7, 30]),
    priority=st.integers(-1, 1),
    salt=st.sampled_from(["", "", "", "tenant"]),
    bypass=st.sampled_from([False, False, True]),
    scores_prompt=st.sampled_from([False, False, True]),
    steps_before=st.integers(0, 3),
    fate=st.sampled_from(["live"] * 6 + ["cancel", "cancel in a step", "fail"]),
)


@settings(max_examples=200)
@given(
    st.lists(arrivals, min_size=1, max_size=14),
    st.integers(12, 40),
    st.integers(1, 6),
    st.integers(0, 20),
    st.integers(24, 48),
    st.sampled_from([math.inf, 1.2, 2.0]),
    st.sampled_from(["waits", "speculates", "runs ahead", "runs ahead"]),
    st.randoms(use_true_random=False),
)
def test_every_request_yields_the_same_output_as_when_it_runs_alone(
    script: list[Arrival],
    num_blocks: int,
    max_running: int,
    extra_budget: int,
    max_context: int,
    prefill_slowdown: float,
    mode: str,
    random: Random,
) -> None:
    m = machine(
        num_blocks,
        max_running,
        max_running + extra_budget,
        max_context,
        prefill_slowdown,
        speculates=mode == "speculates",
        runs_ahead=mode == "runs ahead",
    )
    context = m.limits.max_context_tokens
    fates: dict[str, Arrival] = {}
    expected: dict[str, list[int]] = {}
    for number, a in enumerate(script):
        prompt = tuple(range(a.prompt_family + 1, min(a.prompt_length, context - 1) + a.prompt_family + 1))
        whole = expected_output(prompt, a.max_new_tokens, context)
        resumed = whole[: a.num_resumed] if a.num_sequences == 1 else []
        added = request(
            f"r{number}_",
            a.max_new_tokens,
            a.priority,
            num_sequences=a.num_sequences if a.max_new_tokens else 1,
            salt=a.salt,
            bypass=a.bypass,
        )
        m.add(replace(added, logprobs=LogprobOptions(prompt=a.scores_prompt), resume_token_ids=tuple(resumed)), prompt)
        for name in [name for name in m.prompts if name.startswith(f"r{number}_")]:
            fates[name] = a
            seed = sequence_seed(1, m.sequences[name].index)
            expected[name] = expected_output(prompt, a.max_new_tokens, context, seed)
        for _ in range(a.steps_before):
            if not m.scheduler.has_work:
                break
            plan = m.plan()
            planned = m.planned(plan)
            for name in planned:
                if fates[name].fate == "cancel in a step":
                    m.end(name)
            failing = frozenset(name for name in planned if fates[name].fate == "fail")
            deferred = frozenset(name for name in planned if random.random() < (0.02 if m.runs_ahead else 0.2))
            m.run(plan, failing, deferred, fails=random.random() < 0.1)
        if a.fate == "cancel":
            m.end(f"r{number}_")
            assert not m.end(f"r{number}_")
    for name, a in fates.items():
        if a.fate != "live":
            m.end(name)
    m.finish()
    for name, a in fates.items():
        if a.fate == "live":
            assert m.outputs[name] == expected[name]
            assert m.ended[name].finish is not None
            if a.scores_prompt and m.sequences[name].primary is None and name in m.prompt_logprobs:
                prompt = m.prompts[name]
                wanted = tuple(logprob_of(prompt[:end]) for end in range(2, len(prompt) + 1))
                assert m.prompt_logprobs[name] == wanted


def test_a_running_request_gets_a_token_in_every_step_while_a_long_prompt_is_computed() -> None:
    m = machine(max_step_tokens=8)
    m.add(request("chat", 30), (1, 2))
    m.step()
    m.add(request("book", 4, priority=1), tuple(range(1, 60)))
    while (plan := m.step()) and any(s.request_id == "book" and not s.choices for s in plan.sequences):
        chat = next(s for s in plan.sequences if s.request_id == "chat")
        assert chat.choices
        assert plan.num_tokens == 8
    m.finish()


def test_waiting_requests_start_by_priority_then_by_arrival() -> None:
    m = machine(max_running=1)
    for name, priority in (("a", 0), ("b", 0), ("c", 1), ("d", -1)):
        m.add(request(name, 1, priority), (5, 6))
    order = []
    while m.scheduler.has_work:
        order += [s.request_id for s in m.step().sequences]
    assert order == ["c", "a", "b", "d"]


def test_the_newest_request_of_the_lowest_priority_is_preempted() -> None:
    m = machine(num_blocks=12, max_context=28)  # enough blocks for two requests at their full length
    stopping = StoppingCriteria(max_new_tokens=20, ignore_eos=True)
    for index, (name, priority) in enumerate((("low", -1), ("old", 0), ("new", 0), ("high", 1))):
        m.add(
            GenerationRequest(name, "", SamplingParameters(seed=1), stopping=stopping, priority=priority), (7, 8, index)
        )
    m.finish()
    preemptions = {name: m.sequences[name].num_preemptions for name in m.ended}
    assert list(preemptions) == ["high", "old", "new", "low"]
    assert preemptions["high"] == preemptions["old"] == 0
    assert preemptions["new"] > 0
    assert preemptions["low"] > 0
    assert {len(output) for output in m.outputs.values()} == {20}


def test_a_request_of_higher_priority_takes_the_batch_slot_of_a_lower_one() -> None:
    m = machine(max_running=1)
    m.add(request("low", 20), (1, 2, 3))
    m.step()
    m.add(request("equal", 1), (4, 5, 6))
    assert [s.request_id for s in m.step().sequences] == ["low"]
    m.add(request("high", 1, priority=1), (7, 8, 9))
    plan = m.step()
    assert [s.request_id for s in plan.sequences] == ["high"]
    assert (plan.preempted, plan.resumed) == (("low",), ())
    plan = m.step()
    assert (plan.preempted, plan.resumed) == ((), ("low",))
    m.finish()
    assert m.sequences["low"].num_preemptions == 1
    assert m.outputs["low"] == expected_output((1, 2, 3), 20, 100)


def test_nothing_is_preempted_for_a_request_that_would_still_not_fit() -> None:
    m = machine(num_blocks=16, max_context=64)
    m.add(request("large", 20, priority=1), tuple(range(1, 41)))
    m.add(request("small", 20), (50, 51, 52))
    m.step()
    m.step()
    m.add(request("urgent", 1, priority=1), tuple(range(100, 132)))
    assert {s.request_id for s in m.step().sequences} == {"large", "small"}
    m.finish()


def test_a_request_of_higher_priority_preempts_no_more_requests_than_necessary() -> None:
    m = machine(num_blocks=16, max_context=64)
    for index, name in enumerate(("first", "second", "third")):
        m.add(request(name, 30), tuple(range(20 * index + 1, 20 * index + 17)))
    m.step()
    m.step()
    m.add(request("urgent", 1, priority=1), tuple(range(100, 108)))
    assert {s.request_id for s in m.step().sequences} == {"urgent", "first", "second"}
    m.finish()


def test_a_prompt_starts_once_there_is_budget_and_reuses_what_an_earlier_request_computed() -> None:
    m = machine(max_step_tokens=8)
    prompt = tuple(range(1, 25))
    m.add(request("first"), prompt)
    m.add(request("second"), prompt)
    for _ in range(3):
        assert [s.request_id for s in m.step().sequences] == ["first"]
    assert [s.request_id for s in m.step().sequences] == ["first", "second"]
    m.finish()
    assert m.sequences["second"].num_cached_tokens == 20


def test_a_request_of_higher_priority_shares_the_budget_of_a_long_prompt_even_if_others_must_wait_for_it() -> None:
    m = machine(max_step_tokens=8)
    m.add(request("long"), tuple(range(1, 40)))
    m.step()
    m.add(request("low", priority=-1), (1, 2))
    m.add(request("high", priority=1), (3, 4))
    assert m.planned(m.step()) == ["high", "long"]
    m.finish()


def test_free_cached_blocks_are_counted_only_once() -> None:
    m = machine(num_blocks=8)
    prompt = tuple(range(1, 17))
    m.add(request("first", 1), prompt)
    m.finish()
    m.add(request("holder", 3), tuple(range(100, 117)))
    m.step()
    assert m.scheduler.num_free_blocks == 3
    m.add(request("second", 1), prompt)
    assert [s.request_id for s in m.step().sequences] == ["holder"]
    m.finish()
    assert m.sequences["second"].num_preemptions == 0
    assert m.sequences["second"].num_cached_tokens == 12


def test_a_preempted_request_reuses_its_cached_blocks_but_does_not_report_them_as_cached() -> None:
    m = machine(max_running=1)
    m.add(request("low", 4), tuple(range(1, 22)))
    m.step()
    m.add(request("high", 1, priority=1), (50, 51))
    m.step()
    assert [(s.request_id, s.start) for s in m.step().sequences] == [("low", 20)]
    m.finish()
    assert m.sequences["low"].num_preemptions == 1
    assert m.sequences["low"].num_cached_tokens == 0


def test_the_blocks_of_an_output_are_shared_with_the_next_turn() -> None:
    m = machine()
    prompt = tuple(range(5, 15))
    m.add(request("first", 14), prompt)
    m.finish()
    m.add(request("second", 1), (*prompt, *m.outputs["first"], 1, 2))
    assert len(m.outputs["first"]) == 14
    assert m.step().sequences[0].start == 20  # the last token has not been computed
    m.finish()


def test_a_cancelled_prefill_frees_its_blocks_immediately() -> None:
    m = machine(max_step_tokens=8)
    m.add(request("long"), tuple(range(1, 60)))
    m.step()
    m.step()
    assert m.scheduler.num_free_blocks == 64 - 4
    assert m.end("long")
    assert m.scheduler.num_free_blocks == 64
    assert not m.scheduler.has_work


def test_a_request_that_ends_between_plan_and_commit_is_skipped() -> None:
    m = machine()
    m.add(request("gone"), (1, 2, 3))
    m.add(request("stays"), (4, 5, 6))
    plan = m.plan()
    m.end("gone")
    assert list(m.run(plan)) == ["stays"]
    m.finish()


def test_a_request_that_fails_does_not_delay_those_after_it() -> None:
    m = machine()
    for name, prompt in (("fails", (1, 2, 3)), ("succeeds", (4, 5, 6))):
        m.add(request(name), prompt)
    assert list(m.run(m.plan(), failing=frozenset({"fails"}))) == ["fails", "succeeds"]
    m.finish()


@pytest.mark.parametrize(
    ("second", "cached"),
    [({}, 12), ({"salt": "tenant"}, 0), ({"bypass": True}, 0), ({"salt": "", "bypass": False}, 12)],
)
def test_full_blocks_of_a_known_prompt_are_shared(second: dict[str, object], cached: int) -> None:
    m = machine()
    prompt = tuple(range(1, 17))
    m.add(request("first", 6), prompt)
    m.finish()
    m.add(request("second", 6, **second), prompt)
    plan = m.step()
    assert plan.sequences[0].start == cached
    m.finish()
    assert m.sequences["second"].num_cached_tokens == cached
    assert m.outputs["second"] == m.outputs["first"]


def test_running_requests_share_blocks_and_do_not_free_each_others() -> None:
    m = machine()
    prompt = tuple(range(1, 14))
    m.add(request("a", 20), prompt)
    m.step()
    m.add(request("b", 3), prompt)
    plan = m.step()
    tables = {s.request_id: s.block_table for s in plan.sequences}
    assert tables["a"][:3] == tables["b"][:3]
    assert tables["a"][3] != tables["b"][3]
    m.finish()
    assert m.outputs["a"][:3] == m.outputs["b"]


@pytest.mark.parametrize(
    ("stopping", "reason"),
    [
        (StoppingCriteria(max_new_tokens=3), FinishReason.MAX_NEW_TOKENS),
        (StoppingCriteria(max_new_tokens=200), FinishReason.CONTEXT_LENGTH),
        (StoppingCriteria(max_new_tokens=3, stop_token_ids=tuple(range(50))), FinishReason.STOP_TOKEN),
    ],
)
def test_an_output_ends_for_the_first_reason_that_applies(stopping: StoppingCriteria, reason: FinishReason) -> None:
    m = machine(max_context=20)
    prompt = next(p for p in ((n, n + 1) for n in range(1, 50)) if EOS not in expected_output(p, 200, 20))
    m.add(GenerationRequest("r", "", SamplingParameters(seed=1), stopping=stopping), prompt)
    m.finish()
    finish = m.ended["r"].finish
    assert finish is not None
    assert finish.reason is reason


def test_the_eos_token_ends_an_output_unless_it_is_ignored() -> None:
    prompt = next(p for p in ((n, n + 1) for n in range(1, 500)) if expected_output(p, 9, 100)[-1] == EOS)
    length = len(expected_output(prompt, 9, 100))
    m = machine()
    m.add(request("ends", 9), prompt)
    stopping = StoppingCriteria(max_new_tokens=9, ignore_eos=True)
    m.add(GenerationRequest("continues", "", SamplingParameters(seed=1), stopping=stopping), prompt)
    m.finish()
    assert (len(m.outputs["ends"]), len(m.outputs["continues"])) == (length, 9)
    ends = m.ended["ends"].finish
    assert ends is not None
    assert (ends.reason, ends.stop_token_id) == (FinishReason.EOS_TOKEN, EOS)


def test_sequences_of_a_request_share_one_prefill_without_copying() -> None:
    for bypass in (False, True):
        m = machine(max_step_tokens=16)
        prompt = tuple(range(1, 31))
        m.add(request("r", 6, num_sequences=4, bypass=bypass), prompt)
        assert m.planned(m.step()) == ["r"], "its siblings wait for the prompt"
        m.step()
        tables = {m.names[s.sequence_id]: (s.block_table, s.start) for s in m.step().sequences}
        assert set(tables) == {"r", "r1", "r2", "r3"}
        assert all(table[:7] == tables["r"][0][:7] for table, _ in tables.values())
        assert [tables[name][1] for name in ("r1", "r2", "r3")] == [28] * 3
        m.finish()
        for index, name in enumerate(("r", "r1", "r2", "r3")):
            assert m.outputs[name] == expected_output(prompt, 6, 100, sequence_seed(1, index))
        assert len({tuple(m.outputs[name]) for name in tables}) == 4


def test_siblings_continue_if_their_primary_is_cancelled_during_prefill() -> None:
    m = machine(max_step_tokens=8)
    prompt = tuple(range(1, 31))
    m.add(request("r", 6, num_sequences=3), prompt)
    m.step()
    assert m.end("r")
    m.finish()
    assert set(m.ended) == {"r1", "r2"}


def test_a_deferred_sequence_recomputes_one_token_and_yields_the_same_output() -> None:
    m = machine()
    m.add(request("r", 5), (1, 2, 3))
    for _ in range(4):
        m.run(m.plan(), deferred=frozenset({"r"}))
    m.finish()
    assert m.outputs["r"] == expected_output((1, 2, 3), 5, 100)
    assert m.num_computed["r"] == 3 + 4 + len(m.outputs["r"]) - 1


def test_with_no_new_tokens_the_prompt_is_computed_even_if_it_fills_the_context() -> None:
    m = machine(num_blocks=10, max_context=40, max_step_tokens=16)
    m.add(request("r", 0), tuple(range(1, 41)))
    m.finish()
    finish = m.ended["r"].finish
    assert finish is not None
    assert finish.reason is FinishReason.MAX_NEW_TOKENS
    assert (m.outputs["r"], m.num_computed["r"]) == ([], 40)
    m.add(request("again", 3), tuple(range(1, 31)))
    assert m.step().sequences[0].start == 28, "the prompt is in the cache"


def test_a_scored_prompt_is_computed_in_full_even_if_it_is_cached() -> None:
    m = machine(max_step_tokens=8)
    prompt = tuple(range(1, 25))
    m.add(request("first"), prompt)
    m.finish()
    m.add(replace(request("scored"), logprobs=LogprobOptions(prompt=True)), prompt)
    m.finish()
    assert m.sequences["scored"].num_cached_tokens == 0
    assert m.prompt_logprobs["scored"] == tuple(logprob_of(prompt[:end]) for end in range(2, 25))


@pytest.mark.parametrize("num_resumed", [1, 3, 6])
def test_a_resumed_output_continues_where_it_stopped(num_resumed: int) -> None:
    prompt = next(p for p in ((n, n + 1) for n in range(1, 500)) if len(expected_output(p, 8, 100)) == 8)
    whole = expected_output(prompt, 8, 100)
    m = machine()
    m.add(replace(request("r", 8), resume_token_ids=tuple(whole[:num_resumed])), prompt)
    m.finish()
    assert m.outputs["r"] == whole
    assert m.num_computed["r"] == len(prompt) + 7


def test_a_resumed_output_that_had_already_ended_is_not_recomputed() -> None:
    prompt = next(p for p in ((n, n + 1) for n in range(1, 500)) if expected_output(p, 9, 100)[-1] == EOS)
    m = machine()
    m.add(replace(request("r", 9), resume_token_ids=tuple(expected_output(prompt, 9, 100))), prompt)
    assert not m.scheduler.has_work
    finish = m.ended["r"].finish
    assert finish is not None
    assert (finish.reason, finish.stop_token_id) == (FinishReason.EOS_TOKEN, EOS)


def test_tokens_that_end_an_output_are_forbidden_until_min_new_tokens() -> None:
    stopping = StoppingCriteria(max_new_tokens=6, min_new_tokens=2, stop_token_ids=(61, 62))
    m = machine()
    m.add(GenerationRequest("r", "", SamplingParameters(seed=1), stopping=stopping), (70, 71))
    forbidden = []
    while m.scheduler.has_work:
        forbidden += [set(s.choices[0].forbidden_token_ids) for s in m.step().sequences if s.choices]
    assert forbidden[:3] == [{EOS, 61, 62}, {EOS, 61, 62}, set()]


@pytest.mark.parametrize(
    ("decoding", "has_prompt", "has_output"),
    [
        (DecodingOptions(), False, False),
        (DecodingOptions(repetition_penalty=1.5), True, True),
        (DecodingOptions(presence_penalty=0.5), False, True),
        (DecodingOptions(frequency_penalty=-0.5), False, True),
    ],
)
def test_sampling_inputs_include_the_tokens_that_the_penalties_need(
    decoding: DecodingOptions, has_prompt: bool, has_output: bool
) -> None:
    m = machine()
    m.add(replace(request("r", 4), decoding=decoding), (70, 71))
    m.step()
    (inputs,) = m.step().sequences[0].choices
    assert inputs is not None
    assert inputs.prompt_token_ids == ((70, 71) if has_prompt else ())
    assert inputs.output_token_ids == (tuple(m.outputs["r"][:1]) if has_output else ())


def test_sampling_inputs_are_the_same_object_until_they_change() -> None:
    stopping = StoppingCriteria(max_new_tokens=6, min_new_tokens=2, stop_token_ids=(61,), ignore_eos=True)
    m = machine()
    m.add(replace(request("plain"), stopping=stopping), (70, 71))
    m.add(replace(request("penalized"), stopping=stopping, decoding=DecodingOptions(presence_penalty=1)), (72, 73))
    inputs: dict[str, list[SamplingInputs]] = {"plain": [], "penalized": []}
    for _ in range(5):
        for s in m.step().sequences:
            inputs[s.request_id] += s.choices
    for of_request in inputs.values():
        assert [one.forbidden_token_ids for one in of_request] == [(61,), (61,), (), (), ()]
    assert {one.output_token_ids for one in inputs["plain"]} == {()}
    assert inputs["plain"][2] is inputs["plain"][3] is inputs["plain"][4]


@pytest.mark.parametrize(("output", "num_top"), [(False, None), (True, 5)])
def test_log_probabilities_are_asked_for_as_the_request_says(output: bool, num_top: int | None) -> None:
    m = machine()
    m.add(replace(request("r"), logprobs=LogprobOptions(prompt=True, output=output, num_top=5)), (70, 71, 72))
    (step,) = m.step().sequences
    assert step.choices
    assert step.scoring is not None
    assert (step.choices[0].num_top_logprobs, step.scoring.num_top_logprobs) == (num_top, 5)


@pytest.mark.parametrize(("max_new_tokens", "num_resumed"), [(0, 0), (8, 0), (8, 3)])
def test_the_log_probabilities_of_a_prompt_come_with_the_first_event(max_new_tokens: int, num_resumed: int) -> None:
    prompt = next(p for p in ((n, n + 1, n + 2) for n in range(1, 500)) if len(expected_output(p, 8, 100)) == 8)
    resumed = tuple(expected_output(prompt, 8, 100)[:num_resumed])
    m = machine()
    added = request("r", max_new_tokens)
    m.add(replace(added, logprobs=LogprobOptions(prompt=True), resume_token_ids=resumed), prompt)
    (event,) = m.run(m.plan()).values()
    assert event.prompt_logprobs == (logprob_of(prompt[:2]), logprob_of(prompt))
    m.finish()


def running_beside_a_prompt(slowdown: float, num_running: int = 4, length: int = 600) -> tuple[Machine, list[int]]:
    """Returns a machine in which a long prompt has been computed beside running outputs, and the sizes of the steps."""
    m = machine(400, max_step_tokens=512, max_context=1000, prefill_slowdown=slowdown)
    for number in range(num_running):
        m.add(replace(request(f"chat{number}"), stopping=ENDLESS), (number + 1,) * 9)
    for _ in range(3):
        m.step()
    m.add(request("book", 1), tuple(range(length)))
    sizes = []
    while "book" not in m.ended:
        sizes.append(m.step().num_tokens)
    return m, sizes


ENDLESS = StoppingCriteria(max_new_tokens=900, ignore_eos=True)


def test_a_prompt_beside_running_outputs_slows_them_down_by_the_factor_only() -> None:
    m, sizes = running_beside_a_prompt(2.0)
    alone, beside = m.step_seconds(5), [m.step_seconds(size) for size in sizes]
    assert max(beside) <= 2.0 * alone
    assert sum(seconds > 1.6 * alone for seconds in beside) > 0.9 * len(beside), "the prompt gets all that it may"


@pytest.mark.parametrize("num_running", [1, 2, 3, 7])
def test_a_request_that_waits_does_not_delay_a_prompt_that_runs(num_running: int) -> None:
    num_steps = []
    for num_waiting in (0, 1):
        m = machine(400, max_running=num_running + 1, max_step_tokens=512, max_context=1000, prefill_slowdown=1.8)
        for number in range(num_running):
            m.add(replace(request(f"chat{number}"), stopping=ENDLESS), (number + 1,) * 9)
        for _ in range(3):
            m.step()
        for number, length in enumerate([400, 9][: 1 + num_waiting]):
            m.add(request(f"book{number}", 1), (number + 30,) * length)
        num_steps.append(0)
        while "book0" not in m.ended:
            m.step()
            num_steps[-1] += 1
    assert num_steps[0] == num_steps[1] < 70


def test_without_a_factor_a_prompt_gets_whole_steps() -> None:
    assert running_beside_a_prompt(math.inf)[1] == [512, 96]


def test_a_prompt_alone_gets_whole_steps() -> None:
    assert running_beside_a_prompt(2.0, num_running=0)[1] == [512, 88]


def test_several_prompts_share_what_running_outputs_leave() -> None:
    m = machine(400, max_running=8, max_step_tokens=512, max_context=1000, prefill_slowdown=1.5)
    m.add(replace(request("chat"), stopping=ENDLESS), (1,) * 9)
    m.step()
    m.step()
    for number in range(3):
        m.add(request(f"book{number}", 1), (number + 2,) * 100)
    while len(m.ended) < 3:
        plan = m.step()
        assert m.step_seconds(plan.num_tokens) <= 1.5 * m.step_seconds(len(plan.sequences))
    assert list(m.ended) == ["book0", "book1", "book2"]


@pytest.mark.parametrize("num_slow", [0, 1])
def test_a_prompt_starts_beside_one_output_whatever_the_times_of_steps(num_slow: int) -> None:
    m = machine(400, max_step_tokens=512, max_context=1000, prefill_slowdown=1.8)
    m.add(replace(request("chat"), stopping=ENDLESS), (1,))
    for _ in range(10):
        m.step()
    plain, slow = m.step_seconds, num_slow

    def seconds(num_tokens: int) -> float:
        nonlocal slow
        slow -= num_tokens > 1
        return plain(num_tokens) * (10 if num_tokens > 1 and slow >= 0 else 1)

    m.step_seconds = seconds
    m.add(request("book", 1), (2,) * 20)
    for _ in range(30):
        m.step()
    assert list(m.ended) == ["book"]


def test_right_drafts_save_steps() -> None:
    plain, speculating = (machine(max_context=300, speculates=speculates) for speculates in (False, True))
    for m in (plain, speculating):
        m.step_seconds = lambda _: 1.0
        m.add(replace(request("r"), stopping=replace(ENDLESS, max_new_tokens=200)), (3, 4, 5))
    steps = [0, 0]
    for number, m in enumerate((plain, speculating)):
        while m.scheduler.has_work:
            (sequence,) = m.step().sequences
            assert sequence.num_known == 1 or steps[number] == 0, "a right draft is not computed again"
            steps[number] += 1
    assert plain.outputs == speculating.outputs
    assert steps[0] == 200
    assert steps[1] < 100


def test_nothing_follows_a_stop_token_among_right_drafts() -> None:
    m = machine(speculates=True)
    m.step_seconds = lambda _: 1.0
    text = (15, *expected_output((3, 15), 9, 100))
    stopping = replace(ENDLESS, max_new_tokens=20, stop_token_ids=(text[8],))
    m.add(replace(request("r"), stopping=stopping), (3, *text, *text[:3]))
    m.finish()
    assert tuple(m.outputs["r"]) == text[3:9]


def test_drafts_take_no_blocks_from_others() -> None:
    m = machine(num_blocks=12, max_context=48, speculates=True)
    m.step_seconds = lambda _: 1.0
    for name in ("a", "b"):
        m.add(replace(request(name, 100), stopping=replace(ENDLESS, max_new_tokens=20)), (3,))
    m.finish()
    assert all(sequence.num_preemptions == 0 for sequence in m.sequences.values())
    assert [len(output) for output in m.outputs.values()] == [20, 20]


def test_blocks_that_a_sequence_keeps_for_drafts_are_not_given_to_others() -> None:
    m = machine(num_blocks=25, speculates=True)
    m.step_seconds = lambda _: 1.0
    m.add(replace(request("a"), stopping=replace(ENDLESS, max_new_tokens=80)), (3, *(4, 5, 6) * 3))
    while len((plan := m.plan()).sequences[0].drafts) < 2 * BLOCK_SIZE:
        m.run(plan)
    m.run(plan, deferred=frozenset({"a"}))
    a = m.sequences["a"]
    assert len(a.block_table) > -(-a.num_required // BLOCK_SIZE), "it has a block more than it needs"
    num_free = m.scheduler.num_free_blocks
    m.add(request("b", 1), tuple(range(1, (num_free + 1) * BLOCK_SIZE)))
    assert m.planned(m.step()) == ["a"]
    m.finish()


def test_a_step_that_did_not_fit_in_memory_halves_the_next_ones_for_a_while() -> None:
    scheduler = Scheduler(SchedulerLimits(12, 40, 5000), BlockPool(1250, BLOCK_SIZE), frozenset())
    scheduler.add(request("r", 1), tuple(range(4900)))

    def step() -> int:
        plan = scheduler.plan()
        scheduler.commit(plan, StepResult({}))
        return plan.num_tokens

    sizes = [step()]
    for _ in range(3):
        scheduler.shrink_steps()
        sizes.append(step())
    assert sizes == [40, 20, 12, 12], "every running sequence gets a token in each step"
    assert [step() for _ in range(201)] == [12] * 99 + [24] * 100 + [40] * 2


@pytest.mark.parametrize("seed", [0, 1, 1 << 63])
def test_each_output_has_a_seed_of_its_own(seed: int) -> None:
    m = machine()
    m.add(replace(request("r", num_sequences=2), sampling=SamplingParameters(seed=seed, num_sequences=2)), (1, 2))
    m.step()
    seeds = [step.choices[0].parameters.seed for step in m.step().sequences if step.choices]
    assert seeds == [sequence_seed(seed, index) for index in range(2)]


def test_only_the_first_run_of_a_sequence_is_reported_as_its_start() -> None:
    m = machine(max_running=1)
    m.add(request("low", 20), (1, 2, 3))
    low = m.sequences["low"].sequence_id
    assert [m.step().started for _ in range(2)] == [(low,), ()]
    for round_, name in enumerate(("high", "higher"), start=1):
        m.add(request(name, 1, priority=1), (7, 8, 9))
        assert m.step().started == (m.sequences[name].sequence_id,)
        assert m.step().started == ()
        assert m.sequences["low"].num_preemptions == round_
    m.finish()


def test_a_cancelled_sibling_does_not_run() -> None:
    m = machine(max_step_tokens=8)
    m.add(request("r", 3, num_sequences=3), tuple(range(1, 31)))
    m.step()
    assert m.scheduler.num_waiting == 2
    assert m.end("r1")
    assert m.scheduler.num_waiting == 1
    m.finish()
    assert set(m.ended) == {"r", "r2"}


def test_a_block_is_reused_only_after_the_same_blocks() -> None:
    m = machine()
    prompts = [(*one, *two, *three, 9) for one, two, three in product(((1, 2, 3, 4), (5, 6, 7, 8)), repeat=3)]
    starts = []
    for number, prompt in enumerate(prompts * 2):
        m.add(request(f"r{number}", 1), prompt)
        starts.append(m.step().sequences[0].start)
        m.finish()
    assert starts == [0, 8, 4, 8, 0, 8, 4, 8] + [12] * 8


@pytest.mark.parametrize(
    ("num_held", "urgent", "runs"),
    [
        pytest.param(8, 31, True, id="fits exactly once the other is gone"),
        pytest.param(8, 32, False, id="needs one block more"),
    ],
)
def test_a_request_of_higher_priority_preempts_where_it_fits_then(num_held: int, urgent: int, runs: bool) -> None:
    m = machine(num_blocks=16, max_context=64)
    m.add(request("staying", 30, priority=1), tuple(range(1, 4 * num_held - 1)))
    m.add(request("low", 20), (50, 51, 52))
    m.step()
    m.add(request("urgent", 1, priority=1), tuple(range(100, 100 + urgent)))
    assert {s.request_id for s in m.step().sequences} == {"staying", "urgent" if runs else "low"}
    m.finish()


def test_cached_blocks_count_as_present_for_a_request_that_preempts() -> None:
    m = machine(num_blocks=16, max_context=64)
    prompt = tuple(range(1, 33))
    m.add(request("staying", 20, priority=1), prompt)
    m.step()
    m.add(request("low", 20), tuple(range(60, 80)))
    m.step()
    m.add(request("urgent", 1, priority=1), (*prompt, *range(100, 112)))
    assert {s.request_id for s in m.step().sequences} == {"staying", "urgent"}
    m.finish()


def fed(added: GenerationRequest, tokens: Sequence[int], matcher: Matcher | None = None) -> list[TokenEvent]:
    """Returns the events of a request whose chosen tokens are `tokens`, as long as it runs."""
    scheduler = Scheduler(SchedulerLimits(4, 32, 100), BlockPool(32, BLOCK_SIZE), frozenset({EOS}))
    added_now = scheduler.add(added, (1, 2), () if matcher is None else (matcher,))
    events = [TokenEvent(sequence.index, finish=finish) for sequence, finish in added_now if finish is not None]
    for token in tokens:
        if not scheduler.has_work:
            break
        plan = scheduler.plan()
        events += [event for _, event in scheduler.commit(plan, StepResult({plan.sequences[0].sequence_id: (token,)}))]
    assert scheduler.has_work == (events[-1].finish is None and events[-1].error is None)
    return events


class ThreeTokens:
    """A matcher that is complete after three tokens, and finds token 99 too expensive."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def advance(self, token_id: int) -> bool:
        if token_id == 99:
            raise InvalidRequestError(FieldViolation("decoding.regex", "too expensive"))
        self.num_tokens += 1
        return self.num_tokens == 3

    def masks(self, drafts: Sequence[int]) -> list[bytes]:
        return [b"\xff"] * (1 + len(drafts))


def test_an_output_ends_once_its_constraint_is_complete() -> None:
    events = fed(request("r"), [7, 8, 9, 10], ThreeTokens())
    assert [event.finish for event in events] == [None, None, Finish(FinishReason.EOS_TOKEN)]


def test_a_constraint_that_is_too_expensive_fails_its_sequence_only() -> None:
    *_, last = fed(request("r"), [7, 99, 9], ThreeTokens())
    assert (last.index, last.token_id, last.finish) == (0, None, None)
    assert isinstance(last.error, InvalidRequestError)


@pytest.mark.parametrize(
    ("resumed", "tokens", "num_events"),
    [
        pytest.param((), [5, 6, 7, 6, 7, 6, 7], 7, id="new tokens only"),
        pytest.param((5, 6, 7, 6), [7, 6, 7], 3, id="completed after resuming"),
        pytest.param((5, 6, 7, 6, 7, 6, 7), [], 1, id="complete when resumed"),
        pytest.param((6, 7, 6, 7, 6, 7, 5), [1], 1, id="over before the resumed end"),
        pytest.param((5, 6, 7, 8, 6, 7, 8, 6, 7, 8), [1], 1, id="longer than the longest cycle"),
    ],
)
def test_an_output_that_repeats_itself_ends_whether_resumed_or_not(
    resumed: tuple[int, ...], tokens: list[int], num_events: int
) -> None:
    stopping = StoppingCriteria(max_new_tokens=20, repetition_guard=RepetitionGuard(min_repeats=3, max_cycle_tokens=2))
    events = fed(replace(request("r"), stopping=stopping, resume_token_ids=resumed), tokens)
    assert len(events) == num_events
    ends_looping = (*resumed, *tokens)[-6:] == (6, 7) * 3
    assert events[-1].finish == (Finish(FinishReason.REPETITION) if ends_looping else None)


def test_a_finish_names_the_stop_token() -> None:
    stopping = StoppingCriteria(max_new_tokens=20, stop_token_ids=(8, 9))
    assert fed(replace(request("r"), stopping=stopping), [7, 9])[-1].finish == Finish(FinishReason.STOP_TOKEN, 9)
