"""Detects outputs that repeat themselves."""

from __future__ import annotations

import numpy as np

from mpt_grpc.request import RepetitionGuard


class RepetitionDetector:
    """Looks for a cycle at the end of a growing list of tokens, for all lengths of a cycle at once."""

    def __init__(self, guard: RepetitionGuard) -> None:
        distances = np.arange(1, guard.max_cycle_tokens + 1)
        self.num_relevant = guard.max_cycle_tokens * guard.min_repeats
        """The number of last tokens that decide whether the tokens end with a repeated cycle."""
        self._recent = np.full(guard.max_cycle_tokens, -1)
        """The last tokens, the newest first."""
        self._runs = np.zeros(guard.max_cycle_tokens, dtype=np.int64)
        """For each distance, how many of the last tokens in a row equal the token that far before them."""
        self._needed = distances * (guard.min_repeats - 1)

    def feed(self, token_id: int) -> bool:
        """Adds a token; returns whether the tokens now end with one cycle repeated `min_repeats` times."""
        self._runs += 1
        self._runs *= self._recent == token_id
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = token_id
        return bool((self._runs >= self._needed).any())
