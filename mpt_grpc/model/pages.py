"""Memory in large pages, in which reading gigabytes takes fewer translations of addresses."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def zeros(num_bytes: int) -> Tensor:
    """Returns zeros, uint8 [num_bytes] on the CPU, in large pages where the system has them.

    Raises MemoryError if the system refuses that much memory.
    """
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no memory for {num_bytes} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
