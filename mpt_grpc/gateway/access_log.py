"""The log's line for each HTTP request."""

from __future__ import annotations

import logging
import time
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpt_grpc.gateway.errors import BadRequestError, shortened

STATUS = "status"
"""The name, in the state of a request, of the status of its response."""
_POLLED_PATHS = ("/debug/engine", "/health", "/metrics", "/ready")
_MAX_LOGGED = 300
_NOTED = {
    "caller": "certified_name",
    "trace_id": "trace_id",
    "request_id": "request_id",
    "error": "refusal",
}
"""The fields of a line that a request may have, by their names in its state."""
_log = logging.getLogger("mpt_grpc.access")


class AccessLogMiddleware:
    """Logs each request when its response, which may be a stream, has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = time.monotonic()

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["state"][STATUS] = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            # If the application sends no response, uvicorn sends one.
            _log_request(scope, scope["state"].get(STATUS, 500), time.monotonic() - start_s)


def note_refusal(scope: Scope, error: BadRequestError) -> None:
    """Adds why the gateway itself refuses a request to its line; the gRPC server logs what it refuses."""
    scope["state"]["refusal"] = str(error)[:_MAX_LOGGED]


def _log_request(scope: Scope, status: int, duration_s: float) -> None:
    level = logging.DEBUG if scope["path"] in _POLLED_PATHS and status < 400 else logging.INFO
    if not _log.isEnabledFor(level):
        return
    method, path = scope["method"], quote(shortened(scope["path"]))
    summary, peer = f"{method} {path} {status}", ":".join(map(str, scope["client"] or ()))
    noted = {name: scope["state"].get(key) for name, key in _NOTED.items()}
    fields: dict[str, Any] = {name: value for name, value in noted.items() if value}
    # Text of callers is quoted, so that it cannot forge a line of the log.
    details = "".join(f" {name}={value!r}" for name, value in fields.items())
    named = {"method": method, "path": path, "http_status": status, "duration_s": round(duration_s, 6), "peer": peer}
    extra = {"summary": summary, "fields": {**named, **fields}}
    _log.log(level, "%s %.3f s peer=%s%s", summary, duration_s, peer, details, extra=extra)
