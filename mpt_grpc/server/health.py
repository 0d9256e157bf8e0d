"""The service `grpc.health.v1.Health`.

grpcio-health-checking has one, too. There, a caller who does not read a watch would hold up all changes of health.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mpt_grpc.errors import OverloadedError
from mpt_grpc.server.writes import end_call

_Response: TypeAlias = health_pb2.HealthCheckResponse
_CallContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_MAX_WATCHES = 1000
"""They need no access token, and each takes about 22 KiB."""
_RETRY_AFTER_S = 30.0


@dataclass(eq=False)
class _Watch:
    """An open watch."""

    host: str
    """The host of its caller; see `_host`."""
    context: _CallContext
    task: asyncio.Task[Any]
    """Runs its handler."""
    change: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it has to look again."""


class Health(health_pb2_grpc.HealthServicer):
    """Tells whether services are serving, once or whenever that changes. Used on one event loop."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._watches: dict[_Watch, None] = {}
        """The open watches, in the order in which they began."""
        self._ending: set[asyncio.Task[None]] = set()

    def set(self, service: str, *, is_serving: bool) -> None:
        """Sets the health of a service."""
        if self._serving.get(service) != is_serving:
            self._serving[service] = is_serving
            for watch in self._watches:
                watch.change.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: _CallContext) -> _Response:
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return self._response(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _CallContext) -> AsyncIterator[_Response]:
        task = asyncio.current_task()
        assert task is not None
        watch, last = _Watch(_host(context.peer()), context, task), None
        if len(self._watches) >= _MAX_WATCHES:
            self._make_room(watch.host)
        self._watches[watch] = None
        try:
            while True:
                if (response := self._response(request.service)) != last:
                    yield response
                    last = response
                await watch.change.wait()
                watch.change.clear()
        finally:
            self._watches.pop(watch, None)

    def _make_room(self, host: str) -> None:
        """Ends a watch of the host that has the most: gRPC's clients do not use servers whose health they cannot watch.

        Raises OverloadedError if the given host has as many, or one fewer, which would only exchange the two.
        """
        error = OverloadedError(
            f"{_MAX_WATCHES} watches of health are open: close those that are not needed, or call Check instead",
            _RETRY_AFTER_S,
        )
        numbers = Counter(watch.host for watch in self._watches)
        most = max(numbers, key=numbers.__getitem__)
        # One that is not read ends only when its connection is closed.
        if numbers[most] <= numbers[host] + 1 or len(self._ending) >= _MAX_WATCHES:
            raise error
        newest = next(watch for watch in reversed(self._watches) if watch.host == most)
        del self._watches[newest]
        ending = asyncio.create_task(end_call(newest.task, newest.context, error))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    def _response(self, service: str) -> _Response:
        is_serving = self._serving.get(service)
        if is_serving is None:
            return _Response(status=_Response.SERVICE_UNKNOWN)
        return _Response(status=_Response.SERVING if is_serving else _Response.NOT_SERVING)


def _host(peer: str) -> str:
    """Returns the host of a caller, given its address as gRPC writes it.

    Of an IPv6 address, these are the first 64 bits: a single machine may have all the addresses that begin with them.
    """
    host = unquote(peer).rpartition(":")[0]
    if not host.startswith("ipv6:"):
        return host
    return f"ipv6:{int(IPv6Address(host[len('ipv6:[') : -1])) >> 64:x}"
