"""When Python collects garbage: a full collection, which looks at every object, stops all threads meanwhile.

With 1,500 uploads in progress it takes 120 ms, and Python would begin one whenever the number of objects has grown by a
quarter, so for every burst of calls.
"""

from __future__ import annotations

import gc

_COLLECTIONS_BEFORE_A_LARGER_ONE = 2
"""After 2 collections of new objects, a larger one takes 1.5 ms; after 10, Python's default, 4 ms."""
_LARGER_ONES_BEFORE_A_FULL_ONE = 4000
"""Some minutes of streams without a pause; Python's default is 10."""


class GarbageCollection:
    """Collections while the server runs."""

    def __init__(self) -> None:
        """Leaves out the objects that exist now, which live as long as the process, from all later collections."""
        gc.collect()
        gc.freeze()
        num_objects, _, _ = gc.get_threshold()
        gc.set_threshold(num_objects, _COLLECTIONS_BEFORE_A_LARGER_ONE, _LARGER_ONES_BEFORE_A_FULL_ONE)
        self._num_steps = 0

    def collect_when_idle(self, num_steps: int) -> None:
        """Collects all garbage, unless no step has been computed since the last time; `num_steps`: those so far."""
        if num_steps != self._num_steps:
            self._num_steps = num_steps
            gc.collect()
