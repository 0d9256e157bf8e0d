"""The service `grpc.health.v1.Health`.

grpcio-health-checking has one, too. There, a caller who does not read a watch would hold up all changes of health.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mpt_grpc.errors import OverloadedError

_Response: TypeAlias = health_pb2.HealthCheckResponse
_CallContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_MAX_WATCHES = 1000
"""They need no access token, and each takes about 22 KiB."""
_RETRY_AFTER_S = 30.0


class Health(health_pb2_grpc.HealthServicer):
    """Tells whether services are serving, once or whenever that changes. Used on one event loop."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._changes: set[asyncio.Event] = set()
        """One for each open watch; set when it has to look again."""

    def set(self, service: str, *, is_serving: bool) -> None:
        """Sets the health of a service."""
        if self._serving.get(service) != is_serving:
            self._serving[service] = is_serving
            for change in self._changes:
                change.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: _CallContext) -> _Response:
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return self._response(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _CallContext) -> AsyncIterator[_Response]:
        if len(self._changes) >= _MAX_WATCHES:
            why = f"{_MAX_WATCHES} watches of health are open: close those that are not needed, or call Check instead"
            raise OverloadedError(why, _RETRY_AFTER_S)
        change, last = asyncio.Event(), None
        self._changes.add(change)
        try:
            while True:
                if (response := self._response(request.service)) != last:
                    yield response
                    last = response
                await change.wait()
                change.clear()
        finally:
            self._changes.discard(change)

    def _response(self, service: str) -> _Response:
        is_serving = self._serving.get(service)
        if is_serving is None:
            return _Response(status=_Response.SERVICE_UNKNOWN)
        return _Response(status=_Response.SERVING if is_serving else _Response.NOT_SERVING)
