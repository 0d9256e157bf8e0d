"""A request has a place from its arrival, while it is still being prepared: it counts, ends early, and is found."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import generation, submit

from mpt_grpc.constraint import Choice, JsonSchema
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.stream import collect
from mpt_grpc.errors import DuplicateRequestError, InternalError, InvalidRequestError, OverloadedError
from mpt_grpc.request import DecodingOptions, SamplingParameters
from mpt_grpc.results import FinishReason
from mpt_grpc.text.guards import OutputWatch


class SlowGuard:
    """A guard that holds up the preparation of slow prompts until the test lets them go; it blocks nothing."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.num_prompts = 0

    def refusal(self, prompt: str) -> str | None:
        self.num_prompts += 1
        assert "quick" in prompt or self.may_go.wait(30)
        return None

    def watch(self) -> OutputWatch:
        return FreeWatch()


class FreeWatch:
    blocked = False

    def feed(self, text: str) -> str:
        return text

    def finish(self) -> str:
        return ""


class FaultyGuard(SlowGuard):
    def refusal(self, prompt: str) -> str | None:
        raise ZeroDivisionError(prompt)


@pytest.fixture
def guard() -> SlowGuard:
    return SlowGuard()


@pytest.fixture
def engine(make_engine: Callable[..., Engine], guard: SlowGuard) -> Engine:
    engine = make_engine(max_running_requests=2, max_waiting_requests=2)
    engine.preparation.guards = (guard,)
    return engine


def test_requests_in_preparation_fill_the_queue(engine: Engine, guard: SlowGuard) -> None:
    streams = [submit(engine, generation(f"r{number}")) for number in range(4)]
    with pytest.raises(OverloadedError) as refused:
        submit(engine, generation("one more"))
    assert refused.value.retry_after_s > 0
    with pytest.raises(DuplicateRequestError):
        submit(engine, generation("r0"))
    state = engine.state().result(30)
    assert state.load.num_preparing == 4
    assert [request.request_id for request in state.in_flight] == ["r0", "r1", "r2", "r3"]
    guard.may_go.set()
    assert [len(collect(stream).token_ids) for stream in streams] == [24] * 4
    assert len(collect(submit(engine, generation("one more"))).token_ids) == 24


def test_the_load_counts_requests_in_preparation_while_no_step_runs(engine: Engine, guard: SlowGuard) -> None:
    engine.preparation.guards = (guard, FaultyGuard())
    stream = submit(engine, generation("never prepared"))
    assert engine.load.num_preparing == 1
    assert engine.state().result(30).load.num_preparing == 1
    guard.may_go.set()
    with pytest.raises(InternalError):
        collect(stream)
    assert engine.load.num_preparing == 0


def test_refusing_a_request_because_the_queue_is_full_tokenizes_nothing(engine: Engine, guard: SlowGuard) -> None:
    streams = [submit(engine, generation(f"r{number}")) for number in range(4)]
    longest = engine.preparation.limits.max_context_tokens
    with pytest.raises(OverloadedError):
        submit(engine, generation("too long once it is tokenized", max_new_tokens=longest))
    with pytest.raises(InvalidRequestError, match=r"stopping\.max_new_tokens"):
        submit(engine, generation("too long", (1, 2), max_new_tokens=longest))
    with pytest.raises(InvalidRequestError, match="top_k"):
        submit(engine, generation("wrong", sampling=SamplingParameters(top_k=-1)))
    guard.may_go.set()
    for stream in streams:
        collect(stream)


def test_a_time_limit_includes_the_preparation(engine: Engine, guard: SlowGuard) -> None:
    request = generation("slow")
    result = collect(submit(engine, replace(request, stopping=replace(request.stopping, time_limit_s=0.1))))
    assert (result.finish.reason, result.token_ids, result.stats.num_prompt_tokens) == (FinishReason.TIME_LIMIT, (), 0)
    guard.may_go.set()
    assert len(collect(submit(engine, request)).token_ids) == 24


@pytest.mark.parametrize("time_limit_s", [1e10, 315_576_000_000.0])
def test_a_time_limit_of_any_length_leaves_the_engine_running(
    engine: Engine, guard: SlowGuard, time_limit_s: float
) -> None:
    """The scheduler thread has nothing to do but to wait for the limit."""
    request = generation("patient")
    patient = submit(engine, replace(request, stopping=replace(request.stopping, time_limit_s=time_limit_s)))
    assert engine.state().result(30).load.num_preparing == 1
    guard.may_go.set()
    assert len(collect(patient).token_ids) == 24


def test_cancelling_a_request_in_preparation_ends_it_and_frees_its_place(engine: Engine, guard: SlowGuard) -> None:
    streams = [submit(engine, generation(f"r{number}")) for number in range(4)]
    assert engine.cancel("r1")
    streams[2].cancel()
    for number in (1, 2):
        assert collect(streams[number]).finish.reason is FinishReason.CANCELLED
    more = [submit(engine, generation(f"more {number}")) for number in range(2)]
    guard.may_go.set()
    for stream in (streams[0], streams[3], *more):
        assert len(collect(stream).token_ids) == 24


def test_a_cancelled_request_is_not_prepared_any_more(engine: Engine, guard: SlowGuard) -> None:
    first, second = (submit(engine, generation(name)) for name in ("first", "second"))  # these occupy both threads
    third = submit(engine, generation("third"))
    third.cancel()
    assert collect(third).finish.reason is FinishReason.CANCELLED
    guard.may_go.set()
    collect(first)
    collect(second)
    assert guard.num_prompts == 2


def test_a_cancelled_request_is_freed_while_the_preparers_are_busy(engine: Engine, guard: SlowGuard) -> None:
    first, second = (submit(engine, generation(name)) for name in ("first", "second"))
    third = generation("third", "Once upon a time " * 100)
    freed = weakref.ref(third)
    stream = submit(engine, third)
    stream.cancel()
    assert collect(stream).finish.reason is FinishReason.CANCELLED
    del third, stream
    engine.state().result(30)  # the thread that ended it has let it go
    gc.collect()
    assert freed() is None
    guard.may_go.set()
    collect(first)
    collect(second)


def test_texts_do_not_wait_for_constraints(engine: Engine, guard: SlowGuard) -> None:
    decoding = DecodingOptions(constraint=JsonSchema('{"type": "integer", "maximum": 9}'))
    slow = [submit(engine, generation(f"slow {number}", decoding=decoding, ignore_eos=False)) for number in range(3)]
    assert len(collect(submit(engine, generation("quick", "a quick fox"))).token_ids) == 24
    assert engine.num_in_flight == 3
    guard.may_go.set()
    assert all(collect(stream).finish.reason is FinishReason.EOS_TOKEN for stream in slow)


def test_ordinary_constraints_do_not_wait_for_slow_ones(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    # Each takes a second of processor time, two at once, to be refused.
    multiples = [JsonSchema(f'{{"type": "integer", "multipleOf": {1000003 + 2 * number}}}') for number in range(6)]
    slow = [
        submit(engine, generation(f"slow {number}", decoding=DecodingOptions(constraint=multiple), ignore_eos=False))
        for number, multiple in enumerate(multiples)
    ]
    choice = DecodingOptions(constraint=Choice(("yes", "no")))
    assert collect(submit(engine, generation("ordinary", decoding=choice, ignore_eos=False))).text in ("yes", "no")
    assert engine.num_in_flight >= 4
    assert engine.cancel("slow 5")
    assert collect(slow[-1]).finish.reason is FinishReason.CANCELLED


@pytest.mark.parametrize(
    ("prompt", "is_quick"),
    [("a" * 1024, True), ("🦊" * 256, True), ("🦊" * 257, False), ((1,) * 1024, True), ((1,) * 1025, False)],
)
def test_what_is_prepared_on_the_event_loop_has_few_tokens(
    make_engine: Callable[..., Engine], prompt: str | tuple[int, ...], is_quick: bool
) -> None:
    preparation = make_engine().preparation
    assert preparation.is_quick(generation("r", prompt)) == is_quick
    assert not is_quick or len(preparation.prepare(generation("r", prompt)).prompt_token_ids) <= 1024


def test_a_refusal_in_preparation_is_raised_by_the_stream_and_frees_the_place(engine: Engine, guard: SlowGuard) -> None:
    guard.may_go.set()
    for number in range(6):
        with pytest.raises(InvalidRequestError):
            collect(submit(engine, generation(f"r{number}", (1 << 20,))))
    assert engine.num_in_flight == 0


def test_a_caller_that_no_longer_waits_for_the_state_does_not_stop_the_engine(engine: Engine, guard: SlowGuard) -> None:
    guard.may_go.set()
    stream = submit(engine, generation("neighbour", max_new_tokens=200))
    for _ in range(300):
        engine.state().cancel()
    assert len(collect(stream).token_ids) == 200
    assert engine.state().result(30).load.num_running == 0


@pytest.mark.parametrize("num_sequences", [0, 17, (1 << 32) - 1])
@pytest.mark.parametrize("prompt", ["Once", "Once upon a time " * 1000])
def test_a_wrong_number_of_outputs_is_refused_before_a_place_is_taken(
    engine: Engine, num_sequences: int, prompt: str
) -> None:
    wrong = generation("wrong", prompt)
    wrong = replace(
        wrong,
        sampling=replace(wrong.sampling, num_sequences=num_sequences),
        stopping=replace(wrong.stopping, time_limit_s=1e-9),
    )
    with pytest.raises(InvalidRequestError, match=r"sampling.num_sequences: \d+ is not in \[1, 4\]"):
        submit(engine, wrong)
    assert engine.num_in_flight == 0


def test_the_id_of_a_request_cannot_forge_a_line_of_the_log(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.preparation.guards = (FaultyGuard(),)
    with pytest.raises(InternalError):
        engine.generate(generation("r\nforged"))
    assert r"'r\nforged' could not be prepared" in caplog.messages[-1]
