"""The block pool: owners are counted correctly, no block leaks, and full blocks are found again by their content."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt_grpc.schedule.block_pool import BlockPool, block_digest, root_digest


def digests(*tokens: int, salt: str = "") -> list[bytes]:
    """Returns the digests of a chain of one-token blocks."""
    found = [root_digest(salt)]
    for token in tokens:
        found.append(block_digest(found[-1], [token]))
    return found[1:]


def test_a_cached_block_is_found_after_it_is_freed_until_it_is_reallocated() -> None:
    pool = BlockPool(2, 1)
    (block,) = pool.allocate(1)
    pool.insert(block, digests(7)[0])
    pool.free([block])
    assert pool.num_free == 2
    assert pool.find(digests(7, 8)) == [block]
    pool.allocate(2)
    assert pool.find(digests(7)) == []


def test_uncached_blocks_are_allocated_first_then_the_least_recently_freed_from_the_end() -> None:
    pool = BlockPool(5, 1)
    old, new = pool.allocate(2), pool.allocate(2)
    for blocks, tokens in ((old, (1, 2)), (new, (3, 4))):
        for block, digest in zip(blocks, digests(*tokens), strict=True):
            pool.insert(block, digest)
    pool.free(old)
    pool.free(new)
    (uncached,) = pool.allocate(1)
    assert uncached not in old + new
    assert [pool.allocate(1)[0] for _ in range(4)] == [old[1], old[0], new[1], new[0]]


def test_a_digest_depends_on_the_salt_and_on_all_preceding_tokens() -> None:
    assert digests(1, 2) != digests(1, 2, salt="tenant")
    assert digests(1, 2)[1] != digests(9, 2)[1]
    assert digests(1, 2)[1] == digests(1, 2)[1]


def test_no_salt_can_be_crafted_to_collide_with_another_salts_blocks() -> None:
    # A salt that spells out the input of a block's digest: its parent's digest, as text, and the block's tokens.
    parent = next(root for root in map(root_digest, map(str, range(10**6))) if _is_text(root))
    salt = (parent + (7).to_bytes(8, "little")).decode()
    assert root_digest(salt) != block_digest(parent, [7])


def _is_text(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


def test_a_block_cannot_be_freed_twice() -> None:
    pool = BlockPool(2, 1)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_a_shared_block_is_free_once_its_last_owner_frees_it() -> None:
    pool = BlockPool(1, 1)
    (block,) = pool.allocate(1)
    pool.insert(block, digests(1)[0])
    pool.share([block])
    pool.free([block])
    assert pool.num_free == 0
    assert pool.num_unowned([block]) == 0
    pool.free([block])
    assert pool.num_free == 1
    assert pool.num_unowned([block]) == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=60))
def test_no_block_leaks_or_is_allocated_twice(script: list[tuple[int, int]]) -> None:
    pool = BlockPool(12, 1)
    owned: list[list[int]] = []
    for n, action in script:
        if n <= pool.num_free and action < 4:
            owned.append(pool.allocate(n))
            for block, digest in zip(owned[-1], digests(*range(action, action + n)), strict=True):
                pool.insert(block, digest)
        elif action == 4:
            found = pool.find(digests(*range(n)))
            pool.share(found)
            owned.append(found)
        elif owned:
            pool.free(owned.pop(n % len(owned)))
        distinct = {block for blocks in owned for block in blocks}
        assert pool.num_free == 12 - len(distinct)
    for blocks in owned:
        pool.free(blocks)
    assert pool.num_free == 12
    assert sorted(pool.allocate(12)) == list(range(12))
