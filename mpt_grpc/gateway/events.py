"""Server-sent events: a response that streams JSON values, and keeps the connection alive while there are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mpt_grpc.gateway.disconnection import disconnected

KEEPALIVE_S = 15
DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(value: dict[str, Any]) -> bytes:
    """Returns a JSON value as an event. Its `type`, if it has one, is also the event's."""
    name = f"event: {value['type']}\n" if "type" in value else ""
    return f"{name}data: {_encode(value)}\n\n".encode()


class EventStream(Response):
    """Sends events as they come until the caller disconnects, and `idle_event` after each KEEPALIVE_S without any."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], idle_event: Callable[[], bytes]) -> None:
        # The header with "buffering" makes nginx pass on each event at once.
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._idle_event = events, idle_event
        self._last_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        streaming = asyncio.ensure_future(self._stream(send))
        disconnecting = asyncio.ensure_future(disconnected(receive))
        tasks = (streaming, disconnecting, asyncio.ensure_future(self._keep_alive(send)))
        try:
            await asyncio.wait({streaming, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
            if streaming.done():
                streaming.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stream(self, send: Send) -> None:
        async for event in self._events:
            await self._send(send, event)
        await send({"type": "http.response.body"})

    async def _keep_alive(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        self._last_s = now()
        while True:
            await asyncio.sleep(self._last_s + KEEPALIVE_S - now())
            if now() >= self._last_s + KEEPALIVE_S:
                await self._send(send, self._idle_event())

    async def _send(self, send: Send, event: bytes) -> None:
        self._last_s = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": event, "more_body": True})
