"""The responses that wait for their callers to read, and the end of those that wait too long.

A caller who keeps a stream open without reading it would otherwise hold its unread tokens forever.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, TypeAlias

import grpc

from mpt_grpc.errors import MptServerError, UnreadResponseError
from mpt_grpc.server import status
from mpt_grpc.server.call import Call

_CallContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class PendingWrites:
    """The streams that are sending a response. Used on one event loop."""

    def __init__(self) -> None:
        self._since: dict[asyncio.Task[Any], tuple[float, _CallContext, Call]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def begin(self, task: asyncio.Task[Any], context: _CallContext, call: Call) -> None:
        """Records that the task, which serves a call, begins to send a response."""
        self._since[task] = time.monotonic(), context, call

    def end(self, task: asyncio.Task[Any]) -> None:
        """Records that the response has been sent, or that the call has ended."""
        self._since.pop(task, None)

    def end_unread(self, timeout_s: float) -> None:
        """Ends the calls to which nothing could be sent for `timeout_s`."""
        latest_s = time.monotonic() - timeout_s
        for task, (since_s, context, call) in list(self._since.items()):
            if since_s < latest_s:
                self.end(task)
                why = f"nothing could be sent for {timeout_s:g} s, because the stream is not read"
                call.failure = UnreadResponseError(why)
                ending = asyncio.create_task(end_call(task, context, call.failure))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)


async def end_call(task: asyncio.Task[Any], context: _CallContext, error: MptServerError) -> None:
    """Ends the handler, which the task runs, and the call once its caller reads or leaves."""
    # The status waits behind a response that is not read, and the handler must not wait with it. A cancelled handler
    # sends no status, so this one comes first.
    asyncio.get_running_loop().call_soon(task.cancel)
    with contextlib.suppress(Exception):  # the abort, or the caller has left
        await status.abort(context, error)
