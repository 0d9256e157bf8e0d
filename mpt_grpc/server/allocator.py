"""The memory that the C library's allocator keeps for later: it is returned to the system while the server is idle."""

from __future__ import annotations

import ctypes

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it


def trim() -> None:
    """Returns free memory to the system.

    Takes 0.1 ms if there is little of it, and up to 30 ms for hundreds of megabytes, during which other threads that
    allocate memory wait.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)
