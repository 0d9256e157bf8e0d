"""The OpenAI-compatible API without a port: requests are passed to the application in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Unpack

import httpx
from grpc_health.v1.health_pb2_grpc import HealthStub
from starlette.types import Receive, Scope, Send

from mpt_grpc.gateway.app import make_app
from mpt_grpc.gateway.callers import Callers
from mpt_grpc.gateway.middleware import HeaderMiddleware
from mpt_grpc_client import AsyncClient, ConnectionOptions
from mpt_grpc_client.channel import resolve
from mpt_grpc_client.purpose import Purpose


@asynccontextmanager
async def in_process_gateway(
    target: str | None, **connection: Unpack[ConnectionOptions]
) -> AsyncIterator[httpx.AsyncClient]:
    """Yields an HTTP client of the API for the gRPC servers at `target`, which are called with the connection's token.

    Requests go on at another server when theirs fails, and take no timeout. Raises InvalidTargetError.
    """
    first = resolve(target, connection)[0]
    async with AsyncClient(target, **connection) as client, first.aio_channel(Purpose.SINGLE) as channel:
        callers = Callers(client, passes_tokens=False, passes_certificates=False)
        app = HeaderMiddleware(make_app(callers, None, [HealthStub(channel)]), None, ())

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "state": {}}, receive, send)

        transport = httpx.ASGITransport(with_state, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=None) as http:
            yield http
