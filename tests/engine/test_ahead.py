"""Steps that are launched before the tokens of the one before are read, as on an accelerator.

A CPU computes a step when it is launched, but the loop does not notice: it reads the result one step later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import UseRunner, generation, submit
from model.conftest import Repeating
from torch import Tensor

from mpt_grpc.constraint import Regex
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.stream import collect
from mpt_grpc.errors import InternalError, UnavailableError
from mpt_grpc.model.runner import Runner, StepOutput
from mpt_grpc.reports import RequestReport, StepReport
from mpt_grpc.request import CacheOptions, DecodingOptions, GenerationRequest, LogprobOptions, SamplingParameters
from mpt_grpc.results import FinishReason, Generation
from mpt_grpc.step import StepPlan
from mpt_grpc.telemetry.tracing import Timelines

pytestmark = pytest.mark.usefixtures("running_ahead")


def crowd() -> list[GenerationRequest]:
    """Requests whose outputs need more blocks than there are, begin with the same tokens, or are several."""
    requests = [
        generation(
            f"r{number}",
            tuple(range(100, 120 + 7 * (number % 3))) + (number,) * number,
            max_new_tokens=10 + 9 * (number % 5),
            sampling=SamplingParameters(temperature=number % 3 / 2, seed=number, num_sequences=1 + number % 4 // 3),
            cache=CacheOptions(bypass=number % 5 == 4),
            priority=number % 7 // 6,
        )
        for number in range(14)
    ]
    stopping = replace(requests[1].stopping, min_new_tokens=5, stop_token_ids=tuple(range(260, 324)))
    return [*requests, replace(requests[1], request_id="stops", stopping=stopping)]


@pytest.fixture(scope="module")
def alone(shared_engine: Engine) -> dict[str, Generation]:
    """The outputs of the crowd, each request computed alone, and one step after the other."""
    return {request.request_id: shared_engine.generate(request) for request in crowd()}


def tokens(generations: dict[str, Generation]) -> dict[str, list[tuple[int, ...]]]:
    return {name: [output.token_ids for output in one.outputs] for name, one in generations.items()}


def run(engine: Engine, requests: list[GenerationRequest]) -> dict[str, Generation]:
    streams = [submit(engine, request) for request in requests]
    return {stream.request_id: collect(stream) for stream in streams}


class Observed(Runner):
    """A runner whose launches are listed, and a receiver of reports, which lists the steps that are complete."""

    trace_interval = None
    in_order: list[str]
    plans: list[StepPlan]
    reports: list[StepReport]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.in_order, self.plans, self.reports = [], [], []

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
        self.in_order.append("launched")
        self.plans.append(plan)
        return super().run(plan, chosen)

    def observe_step(self, report: StepReport) -> None:
        self.in_order.append("complete")
        self.reports.append(report)

    def observe_request(self, report: RequestReport) -> None:
        pass


@pytest.fixture
def observed(use_runner: UseRunner, make_engine: Callable[..., Engine]) -> tuple[Engine, Observed]:
    runners = use_runner(Observed)
    engine = make_engine()
    engine.observe(runners[0])
    return engine, runners[0]


@pytest.mark.parametrize(
    "limits",
    [{}, {"num_blocks": 14}, {"max_step_tokens": 9, "max_running_requests": 5}, {"prefill_slowdown": 1.5}],
    ids=["all at once", "few blocks", "chunks", "times"],
)
def test_tokens_are_the_same(
    limits: dict[str, Any], make_engine: Callable[..., Engine], alone: dict[str, Generation]
) -> None:
    engine = make_engine(**limits)
    generations = run(engine, crowd())
    assert tokens(generations) == tokens(alone)
    assert engine.load.num_free_blocks == limits.get("num_blocks", 512)
    assert (sum(one.stats.num_preemptions for one in generations.values()) > 0) == ("num_blocks" in limits)


def test_a_step_is_launched_before_the_one_before_it_is_read(observed: tuple[Engine, Observed]) -> None:
    engine, runner = observed
    assert len(engine.generate(generation(max_new_tokens=4)).token_ids) == 4
    assert runner.in_order == ["launched", *["launched", "complete"] * 3, "complete"]
    assert [plan.sequences[0].token_ids[-1] < 0 for plan in runner.plans] == [False, True, True, True]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"decoding": DecodingOptions(presence_penalty=0.5)}, id="penalty"),
        pytest.param({"decoding": DecodingOptions(constraint=Regex("a*")), "ignore_eos": False}, id="constraint"),
        pytest.param({"logprobs": LogprobOptions(output=True)}, id="log probabilities"),
    ],
)
def test_a_step_whose_tokens_the_host_needs_is_read_at_once(
    fields: dict[str, Any], observed: tuple[Engine, Observed]
) -> None:
    engine, runner = observed
    engine.generate(generation(max_new_tokens=4, **fields))
    assert runner.in_order == ["launched", "complete"] * (len(runner.in_order) // 2)


def test_an_output_that_ends_by_its_length_takes_no_further_step(observed: tuple[Engine, Observed]) -> None:
    engine, runner = observed
    context = engine.preparation.limits.max_context_tokens
    for request in (generation("a", max_new_tokens=5), generation("b", (7,) * (context - 5), max_new_tokens=None)):
        runner.plans.clear()
        assert len(engine.generate(request).token_ids) == 5
        num_chunks = sum(not plan.sequences[0].choices for plan in runner.plans)
        assert len(runner.plans) == num_chunks + 5


def test_an_output_that_ends_by_a_token_has_computed_one_more_in_vain(observed: tuple[Engine, Observed]) -> None:
    engine, runner = observed
    sampled = generation(sampling=SamplingParameters(temperature=1, seed=3))
    whole = engine.generate(sampled).token_ids
    stop = next(token for place, token in enumerate(whole) if place > 5 and token not in whole[:place])
    runner.plans.clear()
    output = engine.generate(replace(sampled, stopping=replace(sampled.stopping, stop_token_ids=(stop,))))
    assert output.token_ids == whole[: whole.index(stop) + 1]
    assert output.stats.num_output_tokens == len(output.token_ids)
    engine.close()  # completes what is in flight
    assert len(runner.plans) == len(output.token_ids) + 1
    assert engine.load.num_free_blocks == 512


def test_a_step_adds_nothing_to_the_timeline_of_a_request_that_has_ended_meanwhile(
    observed: tuple[Engine, Observed], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner = observed
    launch = runner.run

    def cancel_and_run(*arguments: Any) -> StepOutput:
        engine.cancel("r")
        return launch(*arguments)

    monkeypatch.setattr(runner, "run", cancel_and_run)
    assert engine.generate(generation("r", (7,) * 40)).finish.reason is FinishReason.CANCELLED
    engine.close()  # completes what is in flight
    (report,) = runner.reports
    timelines = Timelines()
    timelines.add(report)
    assert timelines.take("r").events == []


def test_the_times_of_steps_do_not_overlap(observed: tuple[Engine, Observed]) -> None:
    engine, runner = observed
    engine.generate(generation())
    for one, next_ in zip(runner.reports, runner.reports[1:], strict=False):
        assert next_.start_time_s >= one.start_time_s + one.duration_s - 1e-6
        assert next_.duration_s >= 0


class Failing(Runner):
    """Fails in every seventh step of several sequences: when it is launched, or only when it is read."""

    def __init__(self, *arguments: Any, is_late: bool) -> None:
        super().__init__(*arguments)
        self._is_late = is_late
        self.num_failed = self._num_steps = 0

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
        self._num_steps += 1
        fails = self._num_steps % 7 == 0 and len(plan.sequences) > 1
        self.num_failed += fails
        if fails and not self._is_late:
            raise MemoryError("no memory")
        output = super().run(plan, chosen)
        return replace(output, are_finite=torch.tensor(False)) if fails else output


@pytest.mark.parametrize("is_late", [False, True], ids=["at launch", "when read"])
def test_a_step_that_fails_is_repeated_with_the_tokens_that_are_known_by_then(
    is_late: bool, use_runner: UseRunner, make_engine: Callable[..., Engine], alone: dict[str, Generation]
) -> None:
    runners = use_runner(partial(Failing, is_late=is_late))
    engine = make_engine(num_blocks=20)
    assert tokens(run(engine, crowd())) == tokens(alone)
    assert runners[0].num_failed > 3
    assert engine.load.num_free_blocks == 20


class Sick(Runner):
    """The activations of the request `bad` are not finite from its 24th token on."""

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
        output = super().run(plan, chosen)
        is_sick = any(step.request_id == "bad" and step.length >= 24 for step in plan.sequences)
        return replace(output, are_finite=torch.tensor(False)) if is_sick else output


def test_a_sequence_that_fails_in_mid_output_fails_alone(
    use_runner: UseRunner, make_engine: Callable[..., Engine], alone: dict[str, Generation]
) -> None:
    use_runner(Sick)
    engine = make_engine()
    bad = submit(engine, generation("bad", (5,) * 10, max_new_tokens=30))
    assert tokens(run(engine, crowd())) == tokens(alone)
    with pytest.raises(InternalError, match="FloatingPointError"):
        collect(bad)
    assert engine.load.num_free_blocks == 512


class Calling(Runner):
    """Calls what a test wants just before a step is launched, by its number."""

    def __init__(self, *arguments: Any, calls: dict[int, Callable[[], object]]) -> None:
        super().__init__(*arguments)
        self._calls, self._num_steps = calls, 0

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
        self._num_steps += 1
        if self._num_steps in self._calls:
            self._calls[self._num_steps]()
        return super().run(plan, chosen)


def test_requests_that_come_and_go_while_steps_are_in_flight(
    use_runner: UseRunner, make_engine: Callable[..., Engine], alone: dict[str, Generation]
) -> None:
    calls: dict[int, Callable[[], object]] = {}
    use_runner(partial(Calling, calls=calls))
    engine = make_engine(num_blocks=40)
    streams = {}

    def add(request: GenerationRequest) -> None:
        streams[request.request_id] = submit(engine, request)

    for number, request in enumerate(crowd()):
        calls[2 + 2 * number] = lambda r=request: add(r)  # type: ignore[misc]
    gone = replace(crowd()[4], request_id="gone")
    late = generation("late", max_new_tokens=400)
    calls[3], calls[9] = lambda: add(gone), lambda: engine.cancel("gone")
    calls[5] = lambda: add(replace(late, stopping=replace(late.stopping, time_limit_s=0.05)))
    first = engine.generate(generation("first", max_new_tokens=60))
    assert len(first.token_ids) == 60
    generations = {name: collect(stream) for name, stream in streams.items()}
    cancelled, overdue = generations.pop("gone"), generations.pop("late")
    assert cancelled.finish.reason is FinishReason.CANCELLED
    assert cancelled.token_ids == alone["r4"].token_ids[: len(cancelled.token_ids)]
    assert cancelled.stats.num_output_tokens == len(cancelled.token_ids)
    assert overdue.finish.reason is FinishReason.TIME_LIMIT
    assert tokens(generations) == tokens(alone)
    assert engine.load.num_free_blocks == 40


class FailingOnceEmpty(Runner):
    """Its fourth step fails, when its requests have been cancelled and another one has come."""

    def __init__(self, *arguments: Any, meanwhile: Callable[[], None]) -> None:
        super().__init__(*arguments)
        self._meanwhile, self._num_steps = meanwhile, 0

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
        self._num_steps += 1
        output = super().run(plan, chosen)
        if self._num_steps != 4:
            return output
        self._meanwhile()
        return replace(output, are_finite=torch.tensor(False))


def test_nothing_waits_after_a_failed_step_of_which_nothing_remains(
    use_runner: UseRunner, make_engine: Callable[..., Engine]
) -> None:
    later = generation("later", max_new_tokens=5)
    later = replace(later, stopping=replace(later.stopping, time_limit_s=10))
    added = []

    def meanwhile() -> None:
        engine.cancel("a")
        engine.cancel("b")
        added.append(submit(engine, later))

    use_runner(partial(FailingOnceEmpty, meanwhile=meanwhile))
    engine = make_engine()
    gone = [submit(engine, generation(name, max_new_tokens=1000)) for name in "ab"]
    assert [collect(stream).finish.reason for stream in gone] == [FinishReason.CANCELLED] * 2
    assert collect(added[0]).finish.reason is FinishReason.MAX_NEW_TOKENS


class Recorded(Runner):
    """A runner whose decoding steps are replayed, as on a GPU."""

    def __init__(self, *arguments: Any, recorder: Repeating) -> None:
        super().__init__(*arguments[:5], recorder)
        self.warm_up(8, 300)


def test_recorded_steps_are_replayed_with_pending_tokens(
    use_runner: UseRunner, make_engine: Callable[..., Engine], alone: dict[str, Generation]
) -> None:
    recorder = Repeating()
    use_runner(partial(Recorded, recorder=recorder))
    assert tokens(run(make_engine(), crowd())) == tokens(alone)
    assert recorder.num_replays > 10


def test_closing_fails_requests_in_flight(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    stream = submit(engine, generation(max_new_tokens=1000))
    next(iter(stream))
    engine.close()
    with pytest.raises(UnavailableError):
        collect(stream)
