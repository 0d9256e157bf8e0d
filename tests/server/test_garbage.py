"""Full collections of garbage wait until the server is idle."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from mpt_grpc.server.garbage import GarbageCollection


class Node:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def collection() -> Iterator[GarbageCollection]:
    thresholds = gc.get_threshold()
    yield GarbageCollection()
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.mark.usefixtures("collection")
def test_a_burst_of_objects_causes_no_full_collection() -> None:
    num_full = gc.get_stats()[2]["collections"]
    num_new = gc.get_stats()[0]["collections"]
    burst = [Node() for _ in range(200_000)]
    assert gc.get_stats()[0]["collections"] > num_new
    assert gc.get_stats()[2]["collections"] == num_full
    assert len(burst) == 200_000


def test_garbage_is_collected_once_after_steps(collection: GarbageCollection) -> None:
    node = Node()
    reference = weakref.ref(node)
    gc.collect(1)  # from now on, only a full collection looks at it
    del node
    assert reference() is not None
    collection.collect_when_idle(1)
    assert reference() is None
    num_full = gc.get_stats()[2]["collections"]
    collection.collect_when_idle(1)
    assert gc.get_stats()[2]["collections"] == num_full
