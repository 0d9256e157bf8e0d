"""Requests that could not end within the timeouts of their callers are refused while others wait."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from conftest import SteppedRunner, generation

from mpt_grpc.caller import Caller
from mpt_grpc.conversation import Conversation, Message
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.stream import ThreadStream, collect
from mpt_grpc.errors import InvalidRequestError, OverloadedError
from mpt_grpc.request import GenerationRequest, SamplingParameters

NO_TIME_S, LONG_S = 1e-9, 1e6


@pytest.fixture
def engine(make_engine: Callable[..., Engine], stepped: list[SteppedRunner]) -> Engine:
    """An engine that has measured how long requests run, and has one running and one waiting."""
    engine = make_engine(max_running_requests=1, max_waiting_requests=8)
    runner = stepped[0]
    for number in range(8):
        runner.allow()
        runner.allow()
        engine.generate(generation(f"before {number}", max_new_tokens=2))
        for _ in range(2):
            runner.wait_for_step()
    for name in ("running", "waiting"):
        engine.submit(generation(name), ThreadStream)
    for _ in range(2):
        runner.wait_for_step()
        runner.allow()
    runner.wait_for_step()
    assert (engine.load.num_running, engine.load.num_waiting) == (1, 1)
    return engine


@pytest.mark.parametrize("max_new_tokens", [10, None])
def test_a_request_that_would_end_too_late_is_refused(engine: Engine, max_new_tokens: int | None) -> None:
    late = generation("late", max_new_tokens=max_new_tokens)
    with pytest.raises(OverloadedError, match=r"would take about .* in the queue, and its timeout leaves") as refused:
        engine.submit(late, ThreadStream, timeout_s=NO_TIME_S)
    assert refused.value.retry_after_s > 0
    engine.submit(late, ThreadStream, timeout_s=LONG_S).cancel()


@pytest.mark.parametrize("prompt", ["Once", Conversation((Message("user", "Hi"),))])
def test_an_invalid_request_is_refused_as_such(engine: Engine, prompt: str | Conversation) -> None:
    invalid = replace(generation("invalid"), prompt=prompt, sampling=SamplingParameters(top_p=2))
    with pytest.raises(InvalidRequestError, match=r"sampling\.top_p"):
        engine.submit(invalid, ThreadStream, timeout_s=NO_TIME_S)
    for number in range(7):
        engine.submit(generation(f"{number}"), ThreadStream)
    with pytest.raises(InvalidRequestError, match=r"sampling\.top_p"):
        engine.submit(invalid, ThreadStream)
    with pytest.raises(OverloadedError, match="the queue is full"):
        engine.submit(generation("valid"), ThreadStream)


def test_a_request_without_a_timeout_waits(engine: Engine, stepped: list[SteppedRunner]) -> None:
    stream = engine.submit(generation("patient"), ThreadStream)
    stepped[0].run_free()
    assert len(collect(stream).token_ids) == 24


def test_nothing_is_refused_while_none_waits(engine: Engine, stepped: list[SteppedRunner]) -> None:
    engine.cancel("waiting")
    engine.cancel("running")
    stepped[0].run_free()
    engine.generate(generation("in between"))
    assert len(collect(engine.submit(generation("quick"), ThreadStream, timeout_s=NO_TIME_S)).token_ids) == 24


def test_only_what_may_run_before_counts(engine: Engine) -> None:
    """Another caller's request, or one of a higher priority, does not wait for those that wait."""
    request = generation("other", max_new_tokens=1)
    first = replace(request, caller=Caller("another"))
    with pytest.raises(OverloadedError, match=r"would take about .*, 0\.0 s of them in the queue"):
        engine.submit(first, ThreadStream, timeout_s=NO_TIME_S)
    with pytest.raises(OverloadedError, match=r"would take about .*, 0\.0 s of them in the queue"):
        engine.submit(replace(request, priority=1), ThreadStream, timeout_s=NO_TIME_S)


def test_a_wait_is_estimated_by_the_requests_that_the_step_has_started(
    make_engine: Callable[..., Engine], stepped: list[SteppedRunner]
) -> None:
    engine = make_engine(max_running_requests=4, max_waiting_requests=8)
    runner = stepped[0]
    engine.submit(generation("first", max_new_tokens=1), ThreadStream)
    runner.wait_for_step()
    for number in range(6):
        engine.submit(generation(f"next {number}"), ThreadStream)
    runner.allow()
    runner.wait_for_step()
    assert (engine.load.num_running, engine.load.num_waiting) == (4, 2)


def test_a_resumed_request_needs_time_for_what_is_left_of_it(engine: Engine) -> None:
    whole = generation("whole", max_new_tokens=1000)
    resumed = replace(whole, request_id="resumed", resume_token_ids=(5,) * 999)
    assert 50 * least_timeout_s(engine, resumed) < least_timeout_s(engine, whole)


def least_timeout_s(engine: Engine, request: GenerationRequest) -> float:
    """Returns the least power of two with which the request, of a caller of its own, is not refused."""
    for timeout_s in (2.0**exponent for exponent in range(-30, 30)):
        with suppress(OverloadedError):
            engine.submit(replace(request, caller=Caller(request.request_id)), ThreadStream, timeout_s=timeout_s)
            return timeout_s
    raise AssertionError("it is always refused")
