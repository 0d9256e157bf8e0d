"""Whether a gRPC server behind the gateway serves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

_TIMEOUT_S = 2


async def unreadiness(servers: Sequence[HealthStub]) -> str | None:
    """Returns why no server serves, or None as soon as one does: one that does not respond holds nothing up."""
    checks = [asyncio.create_task(_unreadiness(server)) for server in servers]
    try:
        whys = set[str]()
        for check in asyncio.as_completed(checks):
            if (why := await check) is None:
                return None
            whys.add(why)
        return "; ".join(sorted(whys))
    finally:
        for task in checks:
            task.cancel()


async def _unreadiness(server: Any) -> str | None:  # its stubs lack the methods
    try:
        response = await server.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
    except grpc.RpcError:
        return "the gRPC server does not respond"
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        return "the gRPC server is shutting down or its engine has stalled"
    return None
