"""The scheduler against a model of the machine: a cache that remembers what was written to each slot, and a language
model whose next token is a hash of all tokens before it. A plan that reads a wrong, stale or unwritten slot fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt_grpc.errors import InternalError
from mpt_grpc.request import CacheOptions, FinishReason, GenerationRequest, SamplingParameters, StoppingCriteria
from mpt_grpc.schedule.block_pool import BlockPool
from mpt_grpc.schedule.scheduler import Progress, Scheduler, SchedulerLimits
from mpt_grpc.step import SequenceStep, StepPlan, StepResult

BLOCK_SIZE = 4
EOS = 0


def next_token(tokens: Sequence[int]) -> int:
    return blake2b(repr(list(tokens)).encode(), digest_size=1).digest()[0] % 50


def expected_output(prompt: tuple[int, ...], max_new_tokens: int, max_context: int) -> list[int]:
    """What a request yields by itself."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS or len(tokens) - len(prompt) == max_new_tokens or len(tokens) == max_context:
            return tokens[len(prompt) :]


def request(name: str, max_new_tokens: int = 8, priority: int = 0, **cache: object) -> GenerationRequest:
    return GenerationRequest(
        name,
        "",
        SamplingParameters(seed=1),
        StoppingCriteria(max_new_tokens=max_new_tokens),
        CacheOptions(**cache),  # type: ignore[arg-type]
        priority=priority,
    )


@dataclass
class Machine:
    """A scheduler, and the checks that a real model would not make."""

    limits: SchedulerLimits
    num_blocks: int
    prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sharers: dict[str, str] = field(default_factory=dict)
    """Which requests may read each other's slots: those of one salt; one that bypasses the cache only its own."""
    outputs: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, Progress] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits, BlockPool(self.num_blocks, BLOCK_SIZE), frozenset({EOS}))
        self.slots: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}

    def add(self, added: GenerationRequest, prompt: tuple[int, ...]) -> None:
        name, cache = added.request_id, added.cache
        self.prompts[name], self.outputs[name] = prompt, []
        self.sharers[name] = f"only {name}" if cache.bypass else f"salt {cache.salt}"
        self.scheduler.add(added, prompt)

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert bool(plan.sequences) == self.scheduler.has_work
        assert plan.num_tokens <= self.limits.max_step_tokens
        assert len(plan.sequences) <= self.limits.max_running_requests
        assert len({s.request_id for s in plan.sequences}) == len(plan.sequences)
        assert len(plan.sequences) == self.scheduler.num_running, "one that runs was left out"
        written = [slot for s in plan.sequences for slot in self._slots(s, s.start, s.length)]
        assert len(written) == len(set(written)), "two sequences write one slot"
        return plan

    def run(self, plan: StepPlan, failing: frozenset[str] = frozenset()) -> list[Progress]:
        chosen = {}
        for s in plan.sequences:
            known = (*self.prompts[s.request_id], *self.outputs[s.request_id])
            sharers = self.sharers[s.request_id]
            assert s.token_ids == known[s.start : s.length]
            assert s.samples == (s.length == len(known))
            assert s.output_position == len(self.outputs[s.request_id])
            assert len(s.block_table) == -(-s.length // BLOCK_SIZE)
            for position, slot in enumerate(self._slots(s, 0, s.start)):
                assert self.slots[slot] == (sharers, known[: position + 1]), "reads what another sequence wrote"
            for position, slot in enumerate(self._slots(s, s.start, s.length), s.start):
                self.slots[slot] = (sharers, known[: position + 1])
            if s.samples:
                chosen[s.request_id] = next_token(known)
        errors = {name: InternalError("fault") for name in failing}
        progress = self.scheduler.commit(plan, StepResult(chosen, errors))
        for p in progress:
            name = p.sequence.request_id
            assert name not in self.ended
            if p.token_id is not None:
                self.outputs[name].append(p.token_id)
            if p.finish is not None or p.error is not None:
                self.ended[name] = p
        return progress

    def step(self) -> StepPlan:
        plan = self.plan()
        self.run(plan)
        return plan

    def finish(self) -> None:
        """Steps until all have ended; each step computes a token or more, so there is a bound."""
        for _ in range(5000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work
        assert self.scheduler.num_free_blocks == self.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0

    @staticmethod
    def _slots(s: SequenceStep, start: int, end: int) -> list[tuple[int, int]]:
        return [(s.block_table[p // BLOCK_SIZE], p % BLOCK_SIZE) for p in range(start, end)]


def machine(num_blocks: int = 64, max_running: int = 8, max_step_tokens: int = 32, max_context: int = 100) -> Machine:
    return Machine(SchedulerLimits(max_running, max_step_tokens, min(max_context, num_blocks * BLOCK_SIZE)), num_blocks)


arrivals = st.fixed_dictionaries(
    {
        "prompt_family": st.integers(0, 2),
        "prompt_length": st.integers(1, 40),
        "max_new_tokens": st.integers(1, 30),
        "priority": st.integers(-1, 1),
        "salt": st.sampled_from(["", "", "", "tenant"]),
        "bypass": st.sampled_from([False, False, True]),
        "steps_before": st.integers(0, 3),
        "fate": st.sampled_from(["live"] * 6 + ["cancel", "cancel in a step", "fail"]),
    }
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(arrivals, min_size=1, max_size=14),
    st.integers(12, 40),
    st.integers(1, 6),
    st.integers(0, 20),
    st.integers(24, 48),
)
def test_whatever_comes_each_yields_what_it_yields_alone(
    script: list[dict[str, object]], num_blocks: int, max_running: int, extra_budget: int, max_context: int
) -> None:
    m = machine(num_blocks, max_running, max_running + extra_budget, max_context)
    context = m.limits.max_context_tokens
    fates: dict[str, object] = {}
    for index, a in enumerate(script):
        name = f"r{index}"
        length = min(int(str(a["prompt_length"])), context - 1)
        prompt = tuple(range(int(str(a["prompt_family"])) + 1, length + int(str(a["prompt_family"])) + 1))
        fates[name] = a["fate"]
        m.add(
            request(name, int(str(a["max_new_tokens"])), int(str(a["priority"])), salt=a["salt"], bypass=a["bypass"]),
            prompt,
        )
        for _ in range(int(str(a["steps_before"]))):
            plan = m.plan()
            planned = {s.request_id for s in plan.sequences}
            for gone in planned:
                if fates[gone] == "cancel in a step":
                    m.scheduler.end(gone)
            m.run(plan, frozenset(name for name in planned if fates[name] == "fail"))
            if not m.scheduler.has_work:
                break
        if a["fate"] == "cancel":
            m.scheduler.end(name)
            assert m.scheduler.end(name) is None
    for name, fate in fates.items():
        if fate != "live":
            m.scheduler.end(name)
    m.finish()
    for name, fate in fates.items():
        if fate == "live":
            max_new_tokens = int(str(script[int(name[1:])]["max_new_tokens"]))
            assert m.outputs[name] == expected_output(m.prompts[name], max_new_tokens, context)
            assert m.ended[name].finish is not None


def test_a_running_request_gets_its_token_in_every_step_beside_a_long_prompt() -> None:
    m = machine(max_step_tokens=8)
    m.add(request("chat", 30), (1, 2))
    m.step()
    m.add(request("book", 4, priority=1), tuple(range(1, 60)))
    while (plan := m.step()) and any(s.request_id == "book" and not s.samples for s in plan.sequences):
        chat = next(s for s in plan.sequences if s.request_id == "chat")
        assert chat.samples
        assert plan.num_tokens == 8
    m.finish()


def test_priority_then_arrival_decides_who_enters() -> None:
    m = machine(max_running=1)
    for name, priority in (("a", 0), ("b", 0), ("c", 1), ("d", -1)):
        m.add(request(name, 1, priority), (5, 6))
    order = []
    while m.scheduler.has_work:
        order += [s.request_id for s in m.step().sequences]
    assert order == ["c", "a", "b", "d"]


def test_the_newest_of_the_lowest_priority_gives_its_blocks_back() -> None:
    m = machine(num_blocks=12, max_context=28)  # room for two at their full length
    stopping = StoppingCriteria(max_new_tokens=20, ignore_eos=True)
    for index, (name, priority) in enumerate((("low", -1), ("old", 0), ("new", 0), ("high", 1))):
        m.add(GenerationRequest(name, "", SamplingParameters(seed=1), stopping, priority=priority), (7, 8, index))
    m.finish()
    preemptions = {name: progress.sequence.num_preemptions for name, progress in m.ended.items()}
    assert list(preemptions) == ["high", "old", "new", "low"]
    assert preemptions["high"] == preemptions["old"] == 0
    assert preemptions["new"] > 0
    assert preemptions["low"] > 0
    assert {len(output) for output in m.outputs.values()} == {20}


def test_a_higher_priority_takes_the_seat_of_a_lower_one() -> None:
    m = machine(max_running=1)
    m.add(request("low", 20), (1, 2, 3))
    m.step()
    m.add(request("equal", 1), (4, 5, 6))
    assert [s.request_id for s in m.step().sequences] == ["low"]
    m.add(request("high", 1, priority=1), (7, 8, 9))
    assert [s.request_id for s in m.step().sequences] == ["high"]
    m.finish()
    assert m.ended["low"].sequence.num_preemptions == 1
    assert m.outputs["low"] == expected_output((1, 2, 3), 20, 100)


def test_none_is_preempted_for_a_request_that_would_not_fit_even_so() -> None:
    m = machine(num_blocks=16, max_context=64)
    m.add(request("large", 20, priority=1), tuple(range(1, 41)))
    m.add(request("small", 20), (50, 51, 52))
    m.step()
    m.step()
    m.add(request("urgent", 1, priority=1), tuple(range(100, 132)))
    assert {s.request_id for s in m.step().sequences} == {"large", "small"}
    m.finish()


def test_a_higher_priority_preempts_no_more_than_it_needs() -> None:
    m = machine(num_blocks=16, max_context=64)
    for index, name in enumerate(("first", "second", "third")):
        m.add(request(name, 30), tuple(range(20 * index + 1, 20 * index + 17)))
    m.step()
    m.step()
    m.add(request("urgent", 1, priority=1), tuple(range(100, 108)))
    assert {s.request_id for s in m.step().sequences} == {"urgent", "first", "second"}
    m.finish()


def test_a_prompt_enters_when_budget_is_left_and_finds_what_the_one_before_it_computed() -> None:
    m = machine(max_step_tokens=8)
    prompt = tuple(range(1, 25))
    m.add(request("first"), prompt)
    m.add(request("second"), prompt)
    for _ in range(3):
        assert [s.request_id for s in m.step().sequences] == ["first"]
    assert [s.request_id for s in m.step().sequences] == ["first", "second"]
    m.finish()
    assert m.ended["second"].sequence.num_cached_tokens == 20


def test_cached_blocks_without_an_owner_count_as_free_only_once() -> None:
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
    assert m.ended["second"].sequence.num_preemptions == 0
    assert m.ended["second"].sequence.num_cached_tokens == 12


def test_what_a_preemption_undid_is_found_in_the_cache_and_not_told_as_cached() -> None:
    m = machine(max_running=1)
    m.add(request("low", 4), tuple(range(1, 22)))
    m.step()
    m.add(request("high", 1, priority=1), (50, 51))
    m.step()
    assert [(s.request_id, s.start) for s in m.step().sequences] == [("low", 20)]
    m.finish()
    assert m.ended["low"].sequence.num_preemptions == 1
    assert m.ended["low"].sequence.num_cached_tokens == 0


def test_a_cancelled_prefill_frees_its_blocks_at_once() -> None:
    m = machine(max_step_tokens=8)
    m.add(request("long"), tuple(range(1, 60)))
    m.step()
    m.step()
    assert m.scheduler.num_free_blocks == 64 - 4
    assert m.scheduler.end("long") is not None
    assert m.scheduler.num_free_blocks == 64
    assert not m.scheduler.has_work


def test_a_request_that_ends_between_plan_and_commit_is_passed_over() -> None:
    m = machine()
    m.add(request("gone"), (1, 2, 3))
    m.add(request("stays"), (4, 5, 6))
    plan = m.plan()
    m.scheduler.end("gone")
    assert [p.sequence.request_id for p in m.run(plan)] == ["stays"]
    m.finish()


def test_a_request_is_not_taken_for_an_ended_one_of_its_name() -> None:
    m = machine()
    m.add(request("again"), (1, 2, 3, 4, 5))
    plan = m.plan()
    m.scheduler.end("again")
    m.scheduler.add(request("again"), (1, 2, 3, 4, 5))
    assert m.run(plan) == []
    m.finish()
    assert m.outputs["again"] == expected_output((1, 2, 3, 4, 5), 8, 100)


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
    assert m.ended["second"].sequence.num_cached_tokens == cached
    assert m.outputs["second"] == m.outputs["first"]


def test_running_requests_share_blocks_and_neither_frees_the_others() -> None:
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
def test_an_output_ends_for_the_reason_that_came_first(stopping: StoppingCriteria, reason: FinishReason) -> None:
    m = machine(max_context=20)
    prompt = next(p for p in ((n, n + 1) for n in range(1, 50)) if EOS not in expected_output(p, 200, 20))
    m.add(GenerationRequest("r", "", SamplingParameters(seed=1), stopping), prompt)
    m.finish()
    finish = m.ended["r"].finish
    assert finish is not None
    assert finish.reason is reason


def test_the_end_mark_ends_unless_it_is_ignored() -> None:
    prompt = next(p for p in ((n, n + 1) for n in range(1, 500)) if expected_output(p, 9, 100)[-1] == EOS)
    length = len(expected_output(prompt, 9, 100))
    m = machine()
    m.add(request("ends", 9), prompt)
    stopping = StoppingCriteria(max_new_tokens=9, ignore_eos=True)
    m.add(GenerationRequest("goes on", "", SamplingParameters(seed=1), stopping), prompt)
    m.finish()
    assert (len(m.outputs["ends"]), len(m.outputs["goes on"])) == (length, 9)
    ends = m.ended["ends"].finish
    assert ends is not None
    assert (ends.reason, ends.stop_token_id) == (FinishReason.EOS_TOKEN, EOS)
