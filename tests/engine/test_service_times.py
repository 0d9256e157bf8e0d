"""How long a request will run, by those before it."""

from __future__ import annotations

import pytest

from mpt_grpc.engine.service_times import ServiceTimes
from mpt_grpc.results import RequestStats


def stats(prefill_s: float, decode_s: float) -> RequestStats:
    return RequestStats(
        num_prompt_tokens=1,
        num_cached_tokens=0,
        num_preemptions=0,
        seed=0,
        arrival_time_s=0.0,
        scheduled_time_s=1.0,
        first_token_time_s=1.0 + prefill_s,
        end_time_s=1.0 + prefill_s + decode_s,
        num_output_tokens=1,
    )


def test_long_prompts_with_short_outputs_do_not_make_tokens_seem_slow() -> None:
    times = ServiceTimes()
    for _ in range(50):
        times.record(stats(prefill_s=2.0, decode_s=0.0), 1, was_cancelled=False)
        times.record(stats(prefill_s=0.0, decode_s=1.0), 100, was_cancelled=False)
    assert times.run_s(100) <= 2


def test_what_is_decoded_grows_with_what_is_allowed() -> None:
    times = ServiceTimes()
    for _ in range(8):
        times.record(stats(prefill_s=1.0, decode_s=2.0), 100, was_cancelled=False)
    assert times.run_s(300) == pytest.approx(7)
    assert times.run_s(None) == pytest.approx(1)
    assert times.wait_s(6, 2) == pytest.approx(9)


def test_who_uses_all_tokens_does_not_make_a_high_limit_seem_to_take_long() -> None:
    times = ServiceTimes()
    for _ in range(50):
        times.record(stats(prefill_s=0.0, decode_s=10.0), 100, was_cancelled=False)
        times.record(stats(prefill_s=0.0, decode_s=0.1), 1000, was_cancelled=False)
    assert times.run_s(1000) == pytest.approx(0.1)


def test_requests_that_were_cancelled_show_how_long_others_wait_and_not_how_long_one_runs() -> None:
    times = ServiceTimes()
    for _ in range(20):
        times.record(stats(prefill_s=1.0, decode_s=2.0), 100, was_cancelled=True)
    assert times.run_s(300) == 0
    assert times.wait_s(6, 2) == pytest.approx(9)
