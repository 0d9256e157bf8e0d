"""How many tokens a step computes.

Prompts slow running outputs down by a factor only, and a step that did not fit in memory makes the next ones smaller.
"""

from __future__ import annotations

import math

from mpt_grpc.schedule.sequence import Sequence
from mpt_grpc.schedule.step_times import StepTimes

_SMALL_STEPS = 100


class StepBudget:
    """The tokens of the next step, by the times of the last ones."""

    def __init__(self, max_tokens: int, min_tokens: int, prefill_slowdown: float) -> None:
        self.max_tokens = max_tokens
        """The present limit, drafts included; lower for a while after a step that did not fit in memory."""
        self.times = StepTimes()
        self._limit, self._min_tokens, self._prefill_slowdown = max_tokens, min_tokens, prefill_slowdown
        self._num_small_steps = 0
        """The number of steps since the last one that did not fit in memory."""

    def num_tokens(self, running: list[Sequence], *, has_waiting: bool) -> int:
        """Returns the number of tokens that the step may compute, without drafts.

        Prompts may slow running outputs down by `prefill_slowdown`, compared with a step of one token for each
        sequence. If no such step was measured lately, the next one is of that kind. Every other one may have one token
        more at least: unless larger steps are tried, their times remain unknown.
        """
        num_ready = sum(sequence.num_uncomputed == 1 for sequence in running)
        is_alone = not num_ready or (num_ready == len(running) and not has_waiting)
        if self._prefill_slowdown == math.inf or is_alone:
            return self.max_tokens
        num_tokens = len(running)
        if self.times.is_recent(num_tokens):
            allowed = self.times.num_tokens(self._prefill_slowdown * self.times.seconds(num_tokens))
            num_tokens = max(num_tokens + 1, allowed)
        return min(num_tokens, self.max_tokens)

    def record(self, num_tokens: int, seconds: float | None) -> None:
        """Adds a step; `seconds` is how long it took, unless it failed."""
        if seconds is not None:
            self.times.record(num_tokens, seconds)
        if self.max_tokens < self._limit:
            self._num_small_steps += 1
            if self._num_small_steps % _SMALL_STEPS == 0:
                self.max_tokens = min(2 * self.max_tokens, self._limit)

    def shrink(self) -> None:
        """Halves the tokens of a step, because one did not fit in memory; each `_SMALL_STEPS` steps double them
        again."""
        self.max_tokens = max(self._min_tokens, self.max_tokens // 2)
        self._num_small_steps = 0
