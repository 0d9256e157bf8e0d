"""Memory in large pages, in which reading gigabytes takes fewer translations of addresses."""

from __future__ import annotations

import errno
import mmap
from contextlib import suppress

import torch
from torch import Tensor

_MADV_POPULATE_WRITE = 23
"""A constant of Linux 5.14 for which Python has no name."""
_PART_BYTES = 64 << 20
"""No other thread runs Python during a call, and a virtual machine may need seconds for a gigabyte."""


def zeros(num_bytes: int) -> Tensor:
    """Returns zeros, uint8 [num_bytes] on the CPU, in large pages where the system has them.

    On Linux, all pages are in memory at once: a step of the model that is the first to use many of them could take
    several times as long. Raises MemoryError if the system refuses that much memory.
    """
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no memory for {num_bytes} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with suppress(OSError):  # of a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        try:
            for start in range(0, num_bytes, _PART_BYTES):
                memory.madvise(_MADV_POPULATE_WRITE, start, min(_PART_BYTES, num_bytes - start))
        except OSError as error:
            if error.errno != errno.EINVAL:  # of an older system
                raise MemoryError(f"no memory for {num_bytes} bytes") from error
    return torch.frombuffer(memory, dtype=torch.uint8)
