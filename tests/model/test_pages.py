"""Memory in large pages."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest

from mpt_grpc.model import pages


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux are the pages in memory at once")
def test_all_pages_are_in_memory_at_once() -> None:
    before, num_bytes = _memory_bytes(), (160 << 20) + 5
    zeros = pages.zeros(num_bytes)
    assert _memory_bytes() - before > 0.95 * num_bytes
    assert zeros.shape == (num_bytes,)
    assert not zeros.any()


def test_more_memory_than_there_is_raises_memory_error() -> None:
    with pytest.raises(MemoryError):
        pages.zeros(1 << 62)


def _memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
