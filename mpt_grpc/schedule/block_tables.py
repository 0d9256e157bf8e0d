"""The blocks of sequences: those they take from the prefix cache, need, are given, and put into it.

Whose turn it is, and who is preempted when blocks run short, is the scheduler's decision.
"""

from __future__ import annotations

from collections.abc import Iterable

from mpt_grpc.schedule.block_pool import BlockPool
from mpt_grpc.schedule.sequence import Sequence


class BlockTables:
    """The block tables of all sequences; their blocks are those of one pool."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool, self._block_size = pool, pool.block_size

    def cached(self, sequence: Sequence) -> list[int]:
        """Returns cached blocks for a prefix of the sequence; at least one token is left to compute."""
        num_cacheable_blocks = sequence.num_cacheable // self._block_size
        if not sequence.request.cache.bypass:
            return self._pool.find(sequence.digests(num_cacheable_blocks, self._block_size))
        primary = sequence.primary
        if primary is None:
            return []
        num_shared = min(primary.num_full_blocks, primary.num_prompt_tokens // self._block_size)
        return list(primary.block_table[: min(num_cacheable_blocks, num_shared)])

    def has_room(self, running: Iterable[Sequence], head: Sequence, hits: list[int]) -> bool:
        """Whether enough blocks are free for the running sequences and `head`, which shares the cached blocks `hits`.

        Each of them needs blocks for its known tokens and the next one.
        """
        needed = self._num_required([head]) - len(hits) + self._pool.num_unowned(hits)
        return self._num_required(running) + needed <= self._pool.num_free

    def would_have_room(self, staying: Iterable[Sequence], head: Sequence, hits: list[int]) -> bool:
        """Whether there would be enough blocks if only `staying` were running."""
        owned = len(set(hits).union(*(sequence.block_table for sequence in staying)))
        return owned + self._num_required([*staying, head]) - len(hits) <= self._pool.num_blocks

    def start(self, sequence: Sequence, hits: list[int]) -> None:
        """Starts a sequence with the cached blocks `hits`."""
        self._pool.share(hits)
        sequence.start(hits, len(hits) * self._block_size)

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Allocates blocks for the first `num_tokens` tokens; returns False if too few are free."""
        missing = self._num_missing(sequence, num_tokens)
        if missing > self._pool.num_free:
            return False
        sequence.block_table += tuple(self._pool.allocate(missing))
        return True

    def advance(self, sequence: Sequence, num_computed: int) -> None:
        """Records the number of computed tokens; new full blocks enter the prefix cache."""
        sequence.num_computed = num_computed
        num_full = num_computed // self._block_size
        if num_full <= sequence.num_full_blocks:
            return
        if not sequence.request.cache.bypass:
            digests = sequence.digests(num_full, self._block_size)
            for index in range(sequence.num_full_blocks, num_full):
                self._pool.insert(sequence.block_table[index], digests[index])
        sequence.num_full_blocks = num_full

    def release(self, sequence: Sequence) -> None:
        """Frees the blocks of a sequence, and with them what has been computed."""
        self._pool.free(sequence.release())

    def _num_required(self, sequences: Iterable[Sequence]) -> int:
        return sum(self._num_missing(sequence, sequence.num_required) for sequence in sequences)

    def _num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self._block_size) - len(sequence.block_table))
