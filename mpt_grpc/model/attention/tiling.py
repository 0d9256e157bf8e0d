"""How the Triton kernels divide attention among a GPU's processors. Imports no Triton, so that plans can use it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SPLIT_KEYS = 256
"""How many keys of a context one program attends to when it decodes; fixed, so that results do not depend on a batch."""
MAX_HEAD_DIM = 128
MAX_GROUP = 64
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


def decode_tiling(group: int, dtype: torch.dtype) -> Tiling:
    """Returns the tiling for sequences with so few new tokens that one tile has them all; the context is split.

    `dtype` is that of the queries.
    """
    rows = max(16, power_of_two(group))  # tensor cores multiply at least 16 rows
    keys = 16 if dtype == torch.float32 else 32
    return Tiling(group, rows, keys, num_warps=4 if rows <= 32 else 8, num_stages=3)


def prefill_tiling(group: int, dtype: torch.dtype) -> Tiling:
    """Returns the tiling for longer chunks, each of whose tiles attends to the whole context."""
    if dtype == torch.float32:
        return Tiling(group, max(32, power_of_two(group)), keys=16, num_warps=4, num_stages=2)
    return Tiling(group, rows=64, keys=64, num_warps=8, num_stages=2)


def power_of_two(minimum: int) -> int:
    """Returns the smallest power of two that is not below `minimum`."""
    return 1 << (minimum - 1).bit_length()
