"""How long a request will run, by those before it."""

from __future__ import annotations

import pytest

from mpt_grpc.engine.service_times import ServiceTimes
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
