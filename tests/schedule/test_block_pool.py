"""Blocks: each has the owners it was given, none is lost, and full ones are found again by what they hold."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mpt_grpc.schedule.block_pool import BlockPool, block_digest, root_digest


def digests(*tokens: int, salt: str = "") -> list[bytes]:
    """Of one-token blocks."""
    found = [root_digest(salt)]
    for token in tokens:
        found.append(block_digest(found[-1], [token]))
    return found[1:]


def test_a_published_block_is_found_after_it_was_freed_until_it_is_handed_out() -> None:
    pool = BlockPool(2, 1)
    (block,) = pool.allocate(1)
    pool.publish(block, digests(7)[0])
    pool.free([block])
    assert pool.num_free == 2
    assert pool.find(digests(7, 8)) == [block]
    pool.allocate(2)
    assert pool.find(digests(7)) == []


def test_blank_blocks_go_first_then_the_ends_of_what_was_freed_the_longest_ago() -> None:
    pool = BlockPool(5, 1)
    old, new = pool.allocate(2), pool.allocate(2)
    for blocks, tokens in ((old, (1, 2)), (new, (3, 4))):
        for block, digest in zip(blocks, digests(*tokens), strict=True):
            pool.publish(block, digest)
    pool.free(old)
    pool.free(new)
    (blank,) = pool.allocate(1)
    assert blank not in old + new
    assert [pool.allocate(1)[0] for _ in range(4)] == [old[1], old[0], new[1], new[0]]


def test_the_digest_depends_on_the_salt_and_on_all_tokens_before() -> None:
    assert digests(1, 2) != digests(1, 2, salt="tenant")
    assert digests(1, 2)[1] != digests(9, 2)[1]
    assert digests(1, 2)[1] == digests(1, 2)[1]


def test_no_salt_can_be_made_to_meet_the_blocks_of_another() -> None:
    # A salt that spells out what a block's digest is made of: its parent's digest, as text, and the block's tokens.
    parent = next(root for root in map(root_digest, map(str, range(10**6))) if _is_text(root))
    salt = (parent + (7).to_bytes(8, "little")).decode()
    assert root_digest(salt) != block_digest(parent, [7])


def _is_text(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


def test_a_shared_block_is_free_when_its_last_owner_has_gone() -> None:
    pool = BlockPool(1, 1)
    (block,) = pool.allocate(1)
    pool.publish(block, digests(1)[0])
    pool.share([block])
    pool.free([block])
    assert pool.num_free == 0
    assert pool.num_unowned([block]) == 0
    pool.free([block])
    assert pool.num_free == 1
    assert pool.num_unowned([block]) == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=60))
def test_no_block_is_lost_or_owned_twice(script: list[tuple[int, int]]) -> None:
    pool = BlockPool(12, 1)
    held: list[list[int]] = []
    for n, choice in script:
        if n <= pool.num_free and choice < 4:
            held.append(pool.allocate(n))
            for block, digest in zip(held[-1], digests(*range(choice, choice + n)), strict=True):
                pool.publish(block, digest)
        elif choice == 4:
            found = pool.find(digests(*range(n)))
            pool.share(found)
            held.append(found)
        elif held:
            pool.free(held.pop(n % len(held)))
        owners = [block for blocks in held for block in blocks]
        assert pool.num_free == 12 - len(set(owners))
    for blocks in held:
        pool.free(blocks)
    assert pool.num_free == 12
    assert sorted(pool.allocate(12)) == list(range(12))
