"""Drafts by prompt lookup, and which of them pay."""

from __future__ import annotations

import pytest

from mpt_grpc.schedule.drafts import MAX_DRAFTS, Drafter, most_useful
from mpt_grpc.schedule.step_times import StepTimes


def times(*steps: tuple[int, float]) -> StepTimes:
    """Returns the times after steps, each given as its number of tokens and its milliseconds."""
    measured = StepTimes()
    for num_tokens, milliseconds in steps:
        measured.record(num_tokens, milliseconds / 1000)
    return measured


def test_drafts_are_what_followed_the_last_three_tokens() -> None:
    text = [*range(10, 40), 1, 2, 10, 11, 12]
    assert Drafter().draft(text) == list(range(13, 13 + MAX_DRAFTS))
    assert not Drafter().draft([*range(10, 40), 11, 12])
    assert not Drafter().draft([1])


def test_the_last_occurrence_counts() -> None:
    text = [1, 2, 3, 7, 7, 7, 1, 2, 3, 8, 8, 8, 8]
    assert Drafter().draft([*text, 1, 2, 3])[:4] == [8, 8, 8, 8]
    drafter = Drafter()
    drafter.draft(text[:6])
    assert drafter.draft([*text, 1, 2, 3])[:4] == [8, 8, 8, 8], "tokens that came since"


def test_a_text_that_runs_in_circles_is_drafted_beyond_its_end() -> None:
    assert Drafter().draft([5, 6, 7, 5, 6, 7]) == ([5, 6, 7] * MAX_DRAFTS)[:MAX_DRAFTS]
    assert Drafter().draft([4, 4, 4, 4]) == [4] * MAX_DRAFTS


def test_the_accuracy_follows_what_came_although_no_draft_was_used() -> None:
    circle, drafter = [1, 2, 3, 4], Drafter()
    for length in range(8, 40):
        drafter.draft((circle * 10)[:length])
    assert drafter.accuracy > 0.99
    text = circle * 10
    for number in range(20):  # always something new after 1, 2, 3
        text += [100 + number, 1, 2, 3]
        drafter.draft(text)
    assert drafter.accuracy < 0.1


def test_only_tokens_up_to_the_first_wrong_draft_are_judged() -> None:
    drafter = Drafter()
    text = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    drafter.draft(text)
    assert drafter.accuracy == 0, "nothing has been compared"
    drafter.draft([*text, 4, 5])
    accuracy = drafter.accuracy
    assert accuracy > 0
    drafter.draft([*text, 4, 5, 9, 7, 8])
    assert drafter.accuracy == pytest.approx(0.8 * accuracy)


def test_drafts_that_cost_nothing_are_all_checked() -> None:
    flat = times((1, 1.0), (64, 1.0))
    assert most_useful({0: (0.5, 8)}, 1, 100, flat) == {0: 8}


def test_drafts_that_cost_as_much_as_steps_are_not_checked() -> None:
    proportional = times((1, 1.0), (64, 64.0))
    assert most_useful({0: (0.95, 8), 1: (0.95, 8)}, 2, 100, proportional) == {}


def test_likely_drafts_are_checked_first() -> None:
    steep_from_8_on = times((1, 1.0), (8, 1.2), (64, 64.0))
    chosen = most_useful({3: (0.9, 16), 7: (0.2, 16)}, 2, 100, steep_from_8_on)
    assert chosen == {3: 6}


def test_no_more_drafts_are_checked_than_have_room() -> None:
    flat = times((1, 1.0), (64, 1.0))
    assert sum(most_useful({0: (0.9, 16), 1: (0.9, 16)}, 2, 5, flat).values()) == 5
    assert most_useful({0: (0.9, 0), 1: (0.9, -1)}, 2, 5, flat) == {}
    assert most_useful({}, 0, 5, flat) == {}
