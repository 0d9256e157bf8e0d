"""An output that goes in circles is found out at the token that closes the last one."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from mpt_grpc.request import RepetitionGuard
from mpt_grpc.schedule.repetition import RepetitionDetector


def goes_in_circles(tokens: list[int], guard: RepetitionGuard) -> bool:
    """The oracle: cuts the end into pieces and compares them."""
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
def test_it_is_found_at_the_first_token_that_makes_it_so(tokens: list[int], guard: RepetitionGuard) -> None:
    detector = RepetitionDetector(guard)
    for end, token in enumerate(tokens, start=1):
        assert detector.feed(token) == goes_in_circles(tokens[:end], guard)
