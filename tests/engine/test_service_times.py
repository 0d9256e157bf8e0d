"""How long a request will wait and run, by those before it, and which are refused because of that."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import generation

from mpt_grpc.caller import Caller
from mpt_grpc.engine.overload import too_late_at_arrival, too_late_in_queue
from mpt_grpc.engine.request_record import RequestRecord
from mpt_grpc.engine.service_times import ServiceTimes
from mpt_grpc.engine.state import EngineLoad
from mpt_grpc.engine.stream import ThreadStream
from mpt_grpc.request import GenerationRequest
from mpt_grpc.results import RequestStats


def stats(prefill_s: float, decode_s: float, num_tokens: int) -> RequestStats:
    return RequestStats(
        num_prompt_tokens=1,
        num_cached_tokens=0,
        num_preemptions=0,
        seed=0,
        arrival_time_s=0.0,
        scheduled_time_s=1.0,
        first_token_time_s=1.0 + prefill_s,
        end_time_s=1.0 + prefill_s + decode_s,
        num_output_tokens=num_tokens,
    )


def with_steps(token_s: float) -> ServiceTimes:
    """Returns the times of steps that each give an output one token."""
    times = ServiceTimes()
    for _ in range(20):
        times.record_step(token_s, 1)
    return times


def test_long_prompts_with_short_outputs_do_not_make_tokens_seem_slow() -> None:
    times = with_steps(0.01)
    for _ in range(50):
        times.record(stats(2.0, 0.0, num_tokens=1), 1, 1, was_cancelled=False)
        times.record(stats(0.0, 1.0, num_tokens=100), 1, 100, was_cancelled=False)
    assert times.run_time().seconds(100) <= 2


def test_what_is_decoded_grows_with_what_is_allowed() -> None:
    times = with_steps(0.02)
    for _ in range(8):
        times.record(stats(1.0, 2.0, num_tokens=100), 1, 100, was_cancelled=False)
    assert times.run_time().seconds(300) == pytest.approx(7)
    assert times.run_time().seconds(None) == pytest.approx(1)
    assert times.wait_s(6, 2) == pytest.approx(9)


def test_several_outputs_take_as_long_as_one() -> None:
    times = with_steps(0.02)
    for _ in range(8):
        times.record(stats(1.0, 2.0, num_tokens=400), 4, 100, was_cancelled=False)
    assert times.run_time().seconds(100) == pytest.approx(3)


def test_drafts_that_are_accepted_make_tokens_quicker() -> None:
    times = ServiceTimes()
    for _ in range(8):
        times.record_step(0.04, num_tokens=2)
        times.record(stats(0.0, 2.0, num_tokens=100), 1, 100, was_cancelled=False)
    assert times.run_time().seconds(100) == pytest.approx(2)


def test_a_step_that_was_held_up_hardly_counts() -> None:
    times = with_steps(0.01)
    for _ in range(8):
        times.record(stats(0.0, 1.0, num_tokens=100), 1, 100, was_cancelled=False)
    times.record_step(2.0, 1)
    assert times.run_time().seconds(100) < 1.5


def test_who_uses_all_tokens_does_not_make_a_high_limit_seem_to_take_long() -> None:
    times = with_steps(0.1)
    for _ in range(50):
        times.record(stats(0.0, 10.0, num_tokens=100), 1, 100, was_cancelled=False)
        times.record(stats(0.0, 0.1, num_tokens=1), 1, 1000, was_cancelled=False)
    assert times.run_time().seconds(1000) == pytest.approx(0.1)


def test_steps_that_have_become_slow_count_although_no_request_ends_in_time() -> None:
    times = with_steps(0.01)
    for _ in range(8):
        times.record(stats(0.0, 1.0, num_tokens=100), 1, 100, was_cancelled=False)
    for _ in range(100):
        times.record_step(0.05, 1)
        times.record(stats(0.0, 1.0, num_tokens=20), 1, 100, was_cancelled=True)
    assert times.run_time().seconds(100) == pytest.approx(5, rel=0.1)


def test_requests_that_were_cancelled_show_how_long_others_wait_and_not_how_long_one_runs() -> None:
    times = with_steps(0.02)
    for _ in range(20):
        times.record(stats(1.0, 2.0, num_tokens=100), 1, 100, was_cancelled=True)
    assert times.run_time().seconds(300) == 0
    assert times.wait_s(6, 2) == pytest.approx(9)


@pytest.fixture
def three_seconds() -> ServiceTimes:
    """The times of a server whose requests run for 3 s if they get 100 tokens."""
    times = with_steps(0.02)
    for _ in range(8):
        times.record(stats(1.0, 2.0, num_tokens=100), 1, 100, was_cancelled=False)
    return times


def record(request: GenerationRequest, timeout_s: float) -> RequestRecord:
    """Returns the record of a request that arrives at 10 s."""
    return RequestRecord(request, ThreadStream(request.request_id, lambda: None), None, 10.0, timeout_s)


def test_a_request_is_refused_at_its_arrival_if_a_longer_wait_than_expected_would_be_too_long(
    three_seconds: ServiceTimes,
) -> None:
    request, load = generation(max_new_tokens=100), EngineLoad(num_running=2, num_waiting=1)
    others = [request] * 3  # one of the two running ones and the waiting one make way first
    assert too_late_at_arrival(record(request, 6.75), others, three_seconds, load) is None
    refusals = [too_late_at_arrival(record(request, 2.75), others, three_seconds, load) for _ in range(10)]
    for refusal in refusals:
        assert refusal is not None
        assert "about 6.8 s, 3.0 s of them in the queue, and its timeout leaves 2.8 s" in str(refusal)
        assert 4 <= refusal.retry_after_s <= 8
    assert len({refusal.retry_after_s for refusal in refusals if refusal is not None}) == 10


def test_of_another_caller_as_many_requests_run_before_as_the_caller_itself_has_turns(
    three_seconds: ServiceTimes,
) -> None:
    request = generation(max_new_tokens=100)
    others = [replace(request, caller=Caller("another"))] * 5
    refusal = too_late_at_arrival(record(request, 1.0), others, three_seconds, EngineLoad(num_running=1))
    assert "3.0 s of them in the queue" in str(refusal)


def test_a_request_in_the_queue_is_refused_once_it_could_not_end_in_time(three_seconds: ServiceTimes) -> None:
    waiting, run_time = record(generation(max_new_tokens=100), 5.0), three_seconds.run_time()
    assert too_late_in_queue(waiting, run_time, 12.0) is None
    refusal = too_late_in_queue(waiting, run_time, 12.5)
    assert refusal is not None
    assert "about 3.0 s, after 2.5 s in the queue, and its timeout leaves 2.5 s" in str(refusal)
    assert 2.5 <= refusal.retry_after_s <= 5
