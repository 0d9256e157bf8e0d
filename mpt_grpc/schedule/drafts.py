"""Drafts of the next tokens by prompt lookup: what followed the last tokens where they occurred before.

The model checks all drafts of a step at once, so right ones save steps and wrong ones only cost time. See
https://arxiv.org/abs/2304.04487 and transformers' `prompt_lookup_num_tokens`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from mpt_grpc.schedule.sequence import Sequence as ScheduledSequence
from mpt_grpc.schedule.step_budget import StepBudget
from mpt_grpc.schedule.step_times import StepTimes
from mpt_grpc.step import SequenceStep

TokenIds = Sequence[int]
MAX_DRAFTS = 16
"""How many tokens are drafted for a sequence at most."""
_TINY_S = 1e-9
_NUM_MATCHED = 3
"""How many last tokens must have occurred before."""
_WEIGHT = 0.2
"""The weight of one draft in the share of right ones."""


class Drafter:
    """Drafts for one sequence. It compares every draft with what came, even if the model did not get to check it."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        """Where the last occurrence of these tokens ends."""
        self._num_indexed = _NUM_MATCHED - 1
        """The number of leading tokens whose occurrences are in `_ends`."""
        self._drafts: TokenIds = ()
        self._num_known = 0
        """The number of tokens that were known when these were made."""
        self.accuracy = 0.0
        """The share of right ones among drafts whose predecessors were right; the first ones are only compared."""

    def draft(self, token_ids: TokenIds) -> TokenIds:
        """Returns up to `MAX_DRAFTS` drafts of the tokens that follow the known ones."""
        if len(token_ids) > self._num_known:
            self._learn(token_ids)
            self._index(token_ids)
            self._num_known = len(token_ids)
            start = self._ends.get(tuple(token_ids[-_NUM_MATCHED:]))
            self._drafts = () if start is None else _continued(token_ids, start)
        return self._drafts

    def _learn(self, token_ids: TokenIds) -> None:
        """Compares the last drafts with the tokens that came, up to the first wrong one."""
        for draft, token_id in zip(self._drafts, token_ids[self._num_known :], strict=False):
            self.accuracy += _WEIGHT * ((draft == token_id) - self.accuracy)
            if draft != token_id:
                break

    def _index(self, token_ids: TokenIds) -> None:
        """Adds the occurrences that end before the last token."""
        for end in range(self._num_indexed + 1, len(token_ids)):
            self._ends[tuple(token_ids[end - _NUM_MATCHED : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)


def _continued(token_ids: TokenIds, start: int) -> TokenIds:
    """Returns the tokens from `start` on; beyond the last one it repeats them, as a text does that runs in circles."""
    period = len(token_ids) - start
    return [token_ids[start + i % period] for i in range(MAX_DRAFTS)]


class Drafters:
    """The drafters of all sequences."""

    def __init__(self) -> None:
        self._drafters: dict[int, Drafter] = {}

    def draft(
        self, running: Sequence[ScheduledSequence], steps: Sequence[SequenceStep], budget: StepBudget
    ) -> dict[int, tuple[int, ...]]:
        """Returns the drafts that pay, by the places of the sequences that are to get them."""
        drafts: dict[int, TokenIds] = {}
        candidates: dict[int, tuple[float, int]] = {}
        for place, (sequence, step) in enumerate(zip(running, steps, strict=True)):
            if not step.choices:
                continue
            if sequence.sequence_id not in self._drafters:
                self._drafters[sequence.sequence_id] = Drafter()
            drafter = self._drafters[sequence.sequence_id]
            drafts[place] = drafter.draft(sequence.token_ids)
            candidates[place] = drafter.accuracy, min(len(drafts[place]), sequence.max_remaining - 1)
        num_tokens = sum(len(step.token_ids) for step in steps)
        counts = most_useful(candidates, num_tokens, budget.max_tokens - num_tokens, budget.times)
        return {place: tuple(drafts[place][:count]) for place, count in counts.items()}

    def forget(self, sequence: ScheduledSequence) -> None:
        """Drops the drafter of a sequence that has ended."""
        self._drafters.pop(sequence.sequence_id, None)


def most_useful(
    candidates: Mapping[int, tuple[float, int]], num_tokens: int, max_drafts: int, times: StepTimes
) -> Mapping[int, int]:
    """Returns the number of drafts of each sequence to check for the most new tokens per second.

    candidates: the accuracy and the number of drafts of each sequence that gets a token. num_tokens: the number of
    tokens that the step computes without drafts.
    """
    # A draft is right if all before it are: the likeliest come first, and no draft before its predecessor.
    ranked = sorted(
        (-(accuracy ** (i + 1)), i, key) for key, (accuracy, count) in candidates.items() for i in range(count)
    )

    def rate(new_tokens: float, num_drafts: int) -> float:
        return new_tokens / max(times.seconds(num_tokens + num_drafts), _TINY_S)

    new_tokens, num_best = float(len(candidates)), 0
    best_rate = rate(new_tokens, 0)
    for number, (probability, _, _) in enumerate(ranked[:max_drafts], start=1):
        new_tokens -= probability
        if (new_rate := rate(new_tokens, number)) > best_rate:
            num_best, best_rate = number, new_rate
    return Counter(key for _, _, key in ranked[:num_best])
