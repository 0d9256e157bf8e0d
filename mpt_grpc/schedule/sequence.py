"""One request on its way: the tokens that are known and how many of them are computed.

There are no phases. A prompt, a chunk of one, the newest token and what a preemption has to do again are all just
tokens that are known and not yet computed.
"""

from __future__ import annotations

from mpt_grpc.request import GenerationRequest
from mpt_grpc.schedule.block_pool import Digest, block_digest, root_digest
from mpt_grpc.step import SequenceStep


class Sequence:
    """The state of one request; only the scheduler changes it."""

    def __init__(self, request: GenerationRequest, prompt_token_ids: tuple[int, ...], arrival: int) -> None:
        self.request = request
        self.arrival = arrival
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed = 0
        self.block_table: tuple[int, ...] = ()
        self.num_published = 0
        """Leading blocks that can be found by others."""
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the cache when it first ran; None before."""
        self.num_preemptions = 0
        self._digests: list[Digest] = []

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first: by priority, then by arrival."""
        return (-self.request.priority, self.arrival)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def digests(self, num_blocks: int, block_size: int) -> list[Digest]:
        """The digests of the first `num_blocks` blocks, all of whose tokens are known."""
        while len(self._digests) < num_blocks:
            parent = self._digests[-1] if self._digests else root_digest(self.request.cache.salt)
            start = len(self._digests) * block_size
            self._digests.append(block_digest(parent, self.token_ids[start : start + block_size]))
        return self._digests[:num_blocks]

    def start(self, blocks: list[int], num_tokens: int) -> None:
        """Begins to run with `num_tokens` found in the cache, in `blocks`."""
        self.block_table, self.num_computed, self.num_published = tuple(blocks), num_tokens, len(blocks)
        if self.num_cached_tokens is None:
            self.num_cached_tokens = num_tokens

    def release(self) -> tuple[int, ...]:
        """Forgets what was computed, and returns the blocks that held it."""
        blocks, self.block_table, self.num_computed, self.num_published = self.block_table, (), 0, 0
        return blocks

    def step(self, num_tokens: int) -> SequenceStep:
        """The plan to compute the next `num_tokens`."""
        end = self.num_computed + num_tokens
        return SequenceStep(
            request_id=self.request_id,
            token_ids=tuple(self.token_ids[self.num_computed : end]),
            start=self.num_computed,
            block_table=self.block_table,
            samples=end == len(self.token_ids),
            sampling=self.request.sampling,
            output_position=self.num_output_tokens,
        )
