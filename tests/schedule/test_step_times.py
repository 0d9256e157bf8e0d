"""The measured times of steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt_grpc.schedule.step_times import StepTimes


def measured(**seconds_by_size: float) -> StepTimes:
    """Returns the times after one step of each size; the names are the sizes, such as `_16`."""
    times = StepTimes()
    for name, seconds in seconds_by_size.items():
        times.record(int(name.removeprefix("_")), seconds)
    return times


def test_times_between_two_sizes_are_interpolated() -> None:
    times = measured(_4=1.0, _512=5.0, _64=2.0)
    assert [times.seconds(size) for size in (4, 34, 64, 288, 512)] == pytest.approx([1.0, 1.5, 2.0, 3.5, 5.0])
    assert [times.num_tokens(seconds) for seconds in (1.0, 1.5, 2.0, 3.5, 5.0)] == [4, 34, 64, 288, 512]


def test_times_of_unknown_sizes_are_in_proportion() -> None:
    times = measured(_8=2.0, _16=3.0)
    assert (times.seconds(4), times.seconds(32)) == (1.0, 6.0)
    assert (times.num_tokens(1.0), times.num_tokens(6.0)) == (4, 32)


def test_sizes_that_differ_by_a_third_are_told_apart_and_by_an_eighth_are_not() -> None:
    apart, together = measured(_8=1.0, _11=2.0), measured(_16=1.0, _18=2.0)
    assert (apart.seconds(8), apart.seconds(11)) == (1.0, 2.0)
    assert together.seconds(18) < 1.5


def test_nothing_is_expected_before_the_first_step() -> None:
    assert (StepTimes().seconds(8), StepTimes().num_tokens(1.0), StepTimes().is_recent(8)) == (0.0, 0, False)


def test_a_step_that_had_to_wait_hardly_changes_the_mean() -> None:
    times = measured(_8=1.0)
    times.record(8, 100.0)
    assert times.seconds(8) < 1.3


def test_the_mean_follows_a_lasting_change() -> None:
    times = measured(_8=1.0)
    for _ in range(40):
        times.record(8, 4.0)
    assert times.seconds(8) == pytest.approx(4.0, rel=0.01)


def test_sizes_are_recent_for_64_steps() -> None:
    times = measured(_8=1.0)
    for _ in range(63):
        times.record(100, 1.0)
    assert times.is_recent(8)
    times.record(100, 1.0)
    assert not times.is_recent(8)


@given(
    st.dictionaries(st.integers(1, 600), st.floats(0.001, 10.0), min_size=1, max_size=30),
    st.floats(0.0005, 20.0),
    st.integers(1, 700),
)
def test_a_step_of_the_most_tokens_is_not_expected_to_take_longer(
    steps: dict[int, float], seconds: float, size: int
) -> None:
    times = StepTimes()
    for num_tokens, taken in steps.items():
        times.record(num_tokens, taken)
    assert times.seconds(times.num_tokens(seconds)) <= seconds * (1 + 1e-9)
    assert times.seconds(size) >= 0
