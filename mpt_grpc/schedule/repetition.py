"""Detects outputs that repeat themselves."""

from __future__ import annotations

from mpt_grpc.request import RepetitionGuard


class RepetitionDetector:
    """Looks for a cycle at the end of a growing list of tokens, in O(max_cycle_tokens) per token."""

    def __init__(self, guard: RepetitionGuard) -> None:
        self._min_repeats = guard.min_repeats
        self._token_ids: list[int] = []
        self._runs = [0] * guard.max_cycle_tokens
        """For each distance, how many of the last tokens in a row equal the token that far before them."""

    def feed(self, token_id: int) -> bool:
        """Adds a token; returns whether the tokens now end with one cycle repeated `min_repeats` times."""
        self._token_ids.append(token_id)
        max_distance = min(len(self._runs), len(self._token_ids) - 1)
        for distance in range(1, max_distance + 1):
            is_same = self._token_ids[-1 - distance] == token_id
            self._runs[distance - 1] = self._runs[distance - 1] + 1 if is_same else 0
        return any(run >= distance * (self._min_repeats - 1) for distance, run in enumerate(self._runs, start=1) if run)
