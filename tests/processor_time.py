"""The processor time of a call, for algorithms that must not take minutes where they can take milliseconds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable


def processor_seconds(call: Callable[[], object]) -> float:
    """Returns the time of the calling thread, without that of collecting the garbage of other tests."""
    gc.collect()
    gc.disable()
    try:
        start_s = time.thread_time()
        call()
        return time.thread_time() - start_s
    finally:
        gc.enable()
