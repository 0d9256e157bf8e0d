"""Repetition is detected at the token that completes the last required cycle."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from mpt_grpc.request import RepetitionGuard
from mpt_grpc.schedule.repetition import RepetitionDetector


def ends_with_repetition(tokens: list[int], guard: RepetitionGuard) -> bool:
    """The oracle: compares the end of `tokens` with a repetition of each possible cycle."""
    for length in range(1, guard.max_cycle_tokens + 1):
        end = tokens[-length * guard.min_repeats :]
        if len(end) == length * guard.min_repeats and end == end[:length] * guard.min_repeats:
            return True
    return False


@given(
    st.lists(st.integers(0, 2), max_size=60),
    st.builds(RepetitionGuard, min_repeats=st.integers(2, 6), max_cycle_tokens=st.integers(1, 12)),
)
@example([1, 2, 3] * 4, RepetitionGuard(4, 3))
@example([0] * 5, RepetitionGuard(4, 8))
def test_repetition_is_detected_at_the_first_token_that_completes_it(tokens: list[int], guard: RepetitionGuard) -> None:
    detector = RepetitionDetector(guard)
    for end, token in enumerate(tokens, start=1):
        assert detector.feed(token) == ends_with_repetition(tokens[:end], guard)
    if tokens:
        resumed = RepetitionDetector(guard)
        verdicts = [resumed.feed(token) for token in tokens[-resumed.num_relevant :]]
        assert verdicts[-1] == ends_with_repetition(tokens, guard), "the last relevant tokens decide"
