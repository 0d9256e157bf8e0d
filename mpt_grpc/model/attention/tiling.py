"""How the Triton kernels divide attention among a GPU's processors.

No kernel spills registers with these tiles on any card from 8.0 to 10.0: `tests/model/test_gpu_kernels.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

SPLIT_KEYS = 256
"""How many keys of a context one program attends to when it decodes: fixed, so that results depend on no batch."""
MAX_HEAD_DIM = 128
MAX_GROUP = 32
"""The most heads that may share a key head."""


@dataclass(frozen=True)
class Tiling:
    """The tiles of queries and keys that a program multiplies."""

    group: int
    """The number of heads that share a key head."""
    rows: int
    """The number of queries, of which each token has `group`."""
    keys: int
    num_warps: int
    num_stages: int
    """How many tiles of keys and values are read ahead, plus 1."""

    @property
    def tokens(self) -> int:
        return self.rows // self.group


def decode_tiling(group: int) -> Tiling:
    """Returns the tiling for sequences with so few new tokens that one tile has them all; the context is split."""
    rows = max(16, power_of_two(group))  # tensor cores multiply at least 16 rows
    return Tiling(group, rows, keys=32, num_warps=4, num_stages=3)


def prefill_tiling(group: int) -> Tiling:
    """Returns the tiling for longer chunks, each of whose tiles attends to the whole context."""
    return Tiling(group, rows=64, keys=32, num_warps=4, num_stages=2)


def power_of_two(minimum: int) -> int:
    """Returns the smallest power of two that is not below `minimum`."""
    return 1 << (minimum - 1).bit_length()
