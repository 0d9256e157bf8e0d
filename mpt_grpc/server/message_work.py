"""Work that takes longer the larger a message is: on the event loop for small ones, in a thread for large ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from mpt_grpc.worker_threads import WorkerThreads

_Result = TypeVar("_Result")
_MAX_BYTES_ON_LOOP = 4 << 10
"""Parsing and translating a message of this size takes about as long as handing it to a thread and back."""


class MessageWork:
    """Runs functions of messages, one at a time: parsing holds Python's global lock. Belongs to the event loop."""

    def __init__(self) -> None:
        self._thread = WorkerThreads(1, "message")

    async def run(self, function: Callable[[], _Result], num_bytes: int) -> _Result:
        """Returns the result of a function of a message of `num_bytes`."""
        if num_bytes <= _MAX_BYTES_ON_LOOP:
            return function()
        # If the caller leaves before its turn, the function leaves the queue.
        return await asyncio.wrap_future(self._thread.submit(function))
