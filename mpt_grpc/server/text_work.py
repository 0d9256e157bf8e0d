"""Tokenization and detokenization for callers, off the event loop: a few at once, and a bounded number waiting."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TypeVar

from mpt_grpc.errors import OverloadedError
from mpt_grpc.worker_threads import WorkerThreads

_Result = TypeVar("_Result")
_NUM_THREADS = 2
"""A long text takes up to 200 MiB while it is tokenized."""
MAX_IN_PROGRESS = 64


class TextWork:
    """Runs functions of texts in its own threads. Belongs to the event loop."""

    def __init__(self) -> None:
        self._threads = WorkerThreads(_NUM_THREADS, "text")
        self._num_in_progress = 0

    async def run(self, function: Callable[[], _Result], *, is_quick: bool) -> _Result:
        """Returns the result of a function, which runs on the event loop if it is quick. Raises OverloadedError."""
        if is_quick:
            return function()
        if self._num_in_progress >= MAX_IN_PROGRESS:
            why = f"{self._num_in_progress} long texts are being tokenized or detokenized: retry later"
            raise OverloadedError(why, random.uniform(1, 2))
        self._num_in_progress += 1
        try:
            # If the caller leaves before its turn, the function leaves the queue.
            return await asyncio.wrap_future(self._threads.submit(function))
        finally:
            self._num_in_progress -= 1
