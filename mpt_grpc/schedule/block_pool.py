"""Ownership of KV cache blocks, and the prefix cache: an index of full blocks by content.

Blocks are just numbers here; the tensors are in `model/kv_cache.py`. All operations are O(1) per block.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

Digest = bytes


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, with reference counts and a prefix cache that maps digests to blocks.

    A free block, one without an owner, keeps its content until it is allocated again. Uncached blocks are allocated
    first, then cached ones in the order in which they were freed.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._owners = [0] * num_blocks
        self._free_uncached = list(range(num_blocks - 1, -1, -1))
        self._free_cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}

    @property
    def num_free(self) -> int:
        """The number of blocks without an owner, whether cached or not."""
        return len(self._free_uncached) + len(self._free_cached)

    @property
    def cached(self) -> tuple[int, ...]:
        """The free blocks that are in the prefix cache, in the order in which they would be allocated."""
        return tuple(self._free_cached)

    def allocate(self, n: int) -> list[int]:
        """Returns `n` blocks, each with one owner; at least `n` must be free."""
        assert n <= self.num_free, "the scheduler must check num_free before it allocates"
        blocks = []
        for _ in range(n):
            if self._free_uncached:
                block = self._free_uncached.pop()
            else:
                block, _ = self._free_cached.popitem(last=False)
                del self._block_of[self._digest_of.pop(block)]
            self._owners[block] = 1
            blocks.append(block)
        return blocks

    def find(self, digests: Sequence[Digest]) -> list[int]:
        """Returns the cached blocks of the longest prefix of `digests` that is in the cache, without owning them."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_unowned(self, blocks: Sequence[int]) -> int:
        """Returns the number of `blocks` that are free: sharing them reduces `num_free` by it."""
        return sum(self._owners[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Adds an owner to each of `blocks`, as returned by `find`."""
        for block in blocks:
            self._owners[block] += 1
            self._free_cached.pop(block, None)

    def insert(self, block: int, digest: Digest) -> None:
        """Inserts a full block into the prefix cache, unless another block with the same content is there already."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def free(self, blocks: Sequence[int]) -> None:
        """Removes an owner from each of `blocks`, given in sequence order; the last block is reallocated first."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            assert self._owners[block] >= 0, "a block was freed twice"
            if self._owners[block] == 0:
                if block in self._digest_of:
                    self._free_cached[block] = None
                else:
                    self._free_uncached.append(block)


def root_digest(salt: str) -> Digest:
    """Returns the digest that a request's first block is chained to; different salts never share blocks."""
    # Salts are hashed in a domain of their own, so no salt can be crafted to collide with another's block.
    return blake2b(salt.encode(), digest_size=16, person=b"salt").digest()


def block_digest(parent: Digest, token_ids: Sequence[int]) -> Digest:
    """Returns the digest of a full block: it identifies the block's tokens and all tokens before them."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()
