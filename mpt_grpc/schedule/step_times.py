"""How long steps take by the number of their tokens, as measured lately.

The scheduler sizes steps by it: how many tokens of prompts may join the running outputs, and which drafts pay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_SIZES_PER_DOUBLING = 2
_WEIGHT = 0.2
"""The weight of a new measurement in a mean."""
_MAX_FACTOR = 2.0
"""The most that a step counts, in units of the mean: it may have had to wait for a core."""
_RECENT_STEPS = 64


@dataclass
class _Mean:
    """The mean step of about one size."""

    num_tokens: float
    seconds: float
    number: int
    """The number of the last step of this size."""


class StepTimes:
    """The mean times of steps of similar sizes; in between they are interpolated."""

    def __init__(self) -> None:
        self._means: dict[int, _Mean] = {}
        self._num_steps = 0

    def record(self, num_tokens: int, seconds: float) -> None:
        """Adds a step that computed `num_tokens` tokens."""
        self._num_steps += 1
        mean = self._means.get(_size(num_tokens))
        if mean is None:
            self._means[_size(num_tokens)] = _Mean(num_tokens, seconds, self._num_steps)
            self._means = dict(sorted(self._means.items()))
            return
        mean.num_tokens += _WEIGHT * (num_tokens - mean.num_tokens)
        mean.seconds += _WEIGHT * (min(seconds, _MAX_FACTOR * mean.seconds) - mean.seconds)
        mean.number = self._num_steps

    def is_recent(self, num_tokens: int) -> bool:
        """Whether one of the last steps was of about this size."""
        mean = self._means.get(_size(num_tokens))
        return mean is not None and self._num_steps - mean.number < _RECENT_STEPS

    def seconds(self, num_tokens: int) -> float:
        """Returns the expected time of a step; below the smallest and above the largest known one, in proportion.

        It is 0 before the first step.
        """
        lower = _Mean(0, 0, 0)
        for upper in self._means.values():
            if upper.num_tokens >= num_tokens:
                share = (num_tokens - lower.num_tokens) / (upper.num_tokens - lower.num_tokens)
                return lower.seconds + share * (upper.seconds - lower.seconds)
            lower = upper
        return lower.seconds * num_tokens / lower.num_tokens if lower.num_tokens else 0.0

    def num_tokens(self, seconds: float) -> int:
        """Returns the most tokens of a step that is expected to take at most `seconds`."""
        lower = _Mean(0, 0, 0)
        for upper in self._means.values():
            if upper.seconds > seconds:
                share = (seconds - lower.seconds) / (upper.seconds - lower.seconds)
                return int(lower.num_tokens + share * (upper.num_tokens - lower.num_tokens))
            lower = upper
        return int(lower.num_tokens * seconds / lower.seconds) if lower.seconds else 0


def _size(num_tokens: int) -> int:
    return round(_SIZES_PER_DOUBLING * math.log2(num_tokens))
