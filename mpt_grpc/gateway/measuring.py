"""The metrics of HTTP requests."""

from __future__ import annotations

import time
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from mpt_grpc.gateway.access_log import STATUS
from mpt_grpc.telemetry.metrics import HttpMetrics

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))
_OTHER_METHOD = "_OTHER"
"""How the conventions name a method that is not known: callers choose it."""


class MetricsMiddleware:
    """Measures each request from its arrival to the end of its response, which may be a stream.

    Belongs within `AccessLogMiddleware`, which notes the status.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, scheme = scope["method"] if scope["method"] in _METHODS else _OTHER_METHOD, scope["scheme"]
        start_s = time.monotonic()
        self._metrics.begin(method, scheme)
        try:
            await self._app(scope, receive, send)
        finally:
            # The router adds its route to the scope; a path that it does not know is no label.
            route: Any = scope.get("route")
            status = scope["state"].get(STATUS)
            self._metrics.end(method, scheme, getattr(route, "path", None), status, time.monotonic() - start_s)
