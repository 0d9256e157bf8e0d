"""The statistics of timelines that are computed by hand."""

from __future__ import annotations

import numpy
import pytest

from mpt_grpc.bench.metrics import Distribution, Timeline, batch_over_time, summarize

# Starts at 1 s; tokens at 1.2, 1.3, then two at once at 1.5, and the last one at 1.6.
STREAM = Timeline(None, 1.0, 1.65, (1.2, 1.3, 1.5, 1.6), (1, 1, 2, 1), num_prompt_tokens=10, num_output_tokens=5)
# Starts at 0 s; one token at 0.5.
SINGLE = Timeline(None, 0.0, 0.5, (0.5,), (1,), num_prompt_tokens=4, num_output_tokens=1)
REFUSED = Timeline(None, 0.1, 2.0, failure="429")


def test_times_of_one_request() -> None:
    assert STREAM.time_to_first_token == pytest.approx(0.2)
    assert STREAM.end_to_end_latency == pytest.approx(0.6)
    assert STREAM.time_per_output_token == pytest.approx((0.6 - 0.2) / 4)
    assert SINGLE.time_per_output_token is None


def test_a_message_of_several_tokens_counts_as_equal_gaps() -> None:
    assert STREAM.inter_token_latencies() == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert SINGLE.inter_token_latencies() == []


def test_the_gap_of_a_message_without_tokens_counts_for_the_next() -> None:
    stream = Timeline(None, 0.0, 1.0, (0.1, 0.2, 0.5), (1, 0, 1), num_output_tokens=2)
    assert stream.inter_token_latencies() == pytest.approx([0.4])


def test_rates_count_completed_requests_between_the_first_start_and_the_last_end() -> None:
    summary = summarize([STREAM, SINGLE, REFUSED], {})
    assert (summary.num_completed, summary.failures, summary.goodput) == (2, {"429": 1}, None)
    assert summary.duration == pytest.approx(2.0)
    assert summary.requests_per_second == pytest.approx(2 / 2.0)
    assert summary.output_tokens_per_second == pytest.approx(6 / 2.0)
    assert summary.total_tokens_per_second == pytest.approx(20 / 2.0)


@pytest.mark.parametrize(
    ("objective", "num_good"),
    [
        ({"ttft": 0.3}, 1),
        ({"ttft": 0.6}, 2),
        ({"tpot": 0.09}, 1),  # a single token has none, and meets it
        ({"e2e": 0.55}, 1),
        ({"ttft": 0.6, "tpot": 0.11, "e2e": 0.7}, 2),
        ({"ttft": 0.1, "e2e": 0.7}, 0),
    ],
)
def test_goodput_counts_requests_that_meet_every_limit(objective: dict[str, float], num_good: int) -> None:
    assert summarize([STREAM, SINGLE, REFUSED], objective).goodput == pytest.approx(num_good / 2.0)


@pytest.mark.parametrize("num", [1, 2, 3, 100, 997])
def test_percentiles_are_those_of_numpy(num: int) -> None:
    delays = numpy.random.default_rng(0).exponential(size=num)
    timelines = [Timeline(1.0, 1.0 + delay, 9.0, failure="500") for delay in delays]
    measured = summarize(timelines, {}).start_delay
    assert isinstance(measured, Distribution)
    expected = (delays.mean(), *numpy.percentile(delays, [50, 90, 99]))
    assert (measured.mean, measured.p50, measured.p90, measured.p99) == pytest.approx(expected)


def test_failed_requests_alone_have_no_latencies() -> None:
    summary = summarize([REFUSED, REFUSED], {"ttft": 1})
    assert (summary.num_completed, summary.failures, summary.goodput) == (0, {"429": 2}, 0)
    assert summary.time_to_first_token is summary.inter_token_latency is summary.end_to_end_latency is None


def test_the_batch_grows_with_each_first_token_and_shrinks_with_each_last() -> None:
    other = Timeline(None, 0.0, 1.4, (0.4, 1.5), (1, 1), num_output_tokens=2)
    assert batch_over_time([STREAM, other, SINGLE, REFUSED]) == [(0.4, 1), (0.5, 1), (1.2, 2), (1.5, 1), (1.6, 0)]
