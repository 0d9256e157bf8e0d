"""KV blocks: who owns them, and which full ones can be found again by what they hold.

Only numbers are kept here; the tensors are in `model/kv_cache.py`. All operations are O(1) a block.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

Digest = bytes


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, with reference counts and an index of full blocks by digest.

    A block without an owner keeps its content until it is handed out again: first those that cannot be found, then
    the ones that were let go the longest ago.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._owners = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self._blank) + len(self._kept)

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks without an owner that can be found; the first is handed out first."""
        return tuple(self._kept)

    def allocate(self, n: int) -> list[int]:
        """Hands out `n` blocks, each with one owner; there must be as many free ones."""
        assert n <= self.num_free, "the scheduler counts before it allocates"
        blocks = []
        for _ in range(n):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._kept.popitem(last=False)
                del self._block_of[self._digest_of.pop(block)]
            self._owners[block] = 1
            blocks.append(block)
        return blocks

    def find(self, digests: Sequence[Digest]) -> list[int]:
        """The blocks that hold the longest known beginning of `digests`; they get no owner by this."""
        blocks = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_unowned(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` are free, so that sharing them takes from `num_free`."""
        return sum(self._owners[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Adds an owner to each of `blocks`, which were found."""
        for block in blocks:
            self._owners[block] += 1
            self._kept.pop(block, None)

    def publish(self, block: int, digest: Digest) -> None:
        """Makes a full block findable; the first of several with the same content stays."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def free(self, blocks: Sequence[int]) -> None:
        """Takes an owner from each of `blocks`, given in the order of their sequence: its end is handed out first."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            assert self._owners[block] >= 0, "a block was freed twice"
            if self._owners[block] == 0:
                if block in self._digest_of:
                    self._kept[block] = None
                else:
                    self._blank.append(block)


def root_digest(salt: str) -> Digest:
    """What the digests of a request's blocks start from; other salts never meet."""
    # Salts are hashed apart from blocks: none can be made to spell the content of another's block.
    return blake2b(salt.encode(), digest_size=16, person=b"salt").digest()


def block_digest(parent: Digest, token_ids: Sequence[int]) -> Digest:
    """Names a full block by its tokens and all before them."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()
