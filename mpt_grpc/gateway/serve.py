"""Serves the gateway on the running event loop with uvicorn, as a client of a gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from functools import partial
from ipaddress import ip_address
from typing import Unpack

import grpc
import uvicorn
from fastapi import FastAPI
from grpc_health.v1.health_pb2_grpc import HealthStub
from opentelemetry.trace import Tracer
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from mpt_grpc.gateway.access_log import AccessLogMiddleware
from mpt_grpc.gateway.app import make_app
from mpt_grpc.gateway.callers import Callers
from mpt_grpc.gateway.errors import RATE_LIMIT_HEADERS
from mpt_grpc.gateway.listeners import listening
from mpt_grpc.gateway.measuring import MetricsMiddleware
from mpt_grpc.gateway.metrics import MetricsPage
from mpt_grpc.gateway.middleware import (
    ArrivalMiddleware,
    BodyMemoryMiddleware,
    GracePeriodMiddleware,
    HeaderMiddleware,
    PathMiddleware,
)
from mpt_grpc.gateway.protocol import BoundedProtocol
from mpt_grpc.gateway.tracing import TraceMiddleware
from mpt_grpc.settings import HttpSettings
from mpt_grpc.telemetry.metrics import HttpMetrics
from mpt_grpc.tls import ServerCertificate, http_context
from mpt_grpc.wake_ups import gathered_wake_ups
from mpt_grpc_client import AsyncClient, Client, ConnectionOptions
from mpt_grpc_client.channel import is_balanced, resolve
from mpt_grpc_client.purpose import Purpose

KEEP_ALIVE_TIMEOUT_S = 5
_PAGE_TIMEOUT_S = 10
"""The time in which the caller of `/metrics` on its own port reads a part of the page."""
_ERROR_TIMEOUT_S = 3
"""The time for the errors of requests that are in progress at the end of the grace period."""


@asynccontextmanager
async def running_gateway(
    target: str | Sequence[str] | None,
    host: str,
    settings: HttpSettings,
    grace_s: float = 1,
    *,
    read_timeout_s: float = 600,
    certificate: ServerCertificate | None = None,
    channel: grpc.aio.Channel | None = None,
    tracer: Tracer | None = None,
    metrics: MetricsPage | None = None,
    http_metrics: HttpMetrics | None = None,
    **connection: Unpack[ConnectionOptions],
) -> AsyncIterator[int]:
    """Serves the OpenAI-compatible API for the gRPC servers at `target` inside the block and yields the port.

    The gRPC servers need not be running yet. Requests in progress at the end of the block have `grace_s` to finish.
    Raises SettingsError if it cannot listen on the port.

    read_timeout_s: a connection is closed when nothing could be sent for this long, because the caller does not read.
    certificate: the gateway's own; None serves without TLS.
    channel: a channel to the target that passes responses as objects, instead of a connection; it is closed at the end.
    tracer: records spans of requests.
    metrics: the page at `/metrics`.
    http_metrics: measures the requests.
    connection: how the gateway connects to the target.
    """
    endpoints, is_in_process = resolve(target, connection), channel is not None
    balanced = is_balanced(endpoints, channel)
    purpose = Purpose.of_calls(balanced=balanced, retries=False)
    # Parses responses that would take long to parse on the event loop. The HTTP caller decides whether to retry.
    blocking = nullcontext() if is_in_process else Client(target, retries=False, **connection)
    async with AsyncExitStack() as stack:
        # gRPC shares the connections between channels to the same server.
        with gathered_wake_ups(asyncio.get_running_loop()):
            channels = [channel] if channel else [e.aio_channel(purpose) for e in endpoints]
        for one in channels:
            await stack.enter_async_context(one)
        client = await stack.enter_async_context(AsyncClient(target, channel=channel, retries=False, **connection))
        with blocking as blocking_client, listening(host, settings.port or 0, "--http-port") as listeners:
            passes_tokens = is_in_process or all(endpoint.may_send_tokens for endpoint in endpoints)
            callers = Callers(client, passes_tokens=passes_tokens, passes_certificates=is_in_process)
            app = make_app(
                callers,
                blocking_client,
                [HealthStub(one) for one in channels],
                shows_engine=not balanced,
                strict_model_names=settings.strict_model_names,
            )
            await asyncio.to_thread(app.openapi)  # made once, in 30 ms
            if metrics is not None:
                metrics.add_to(app)
            hosts = _accepted_hosts(listeners, [host, *settings.allow_hosts])
            checked = _checked(app, tracer, hosts, settings.allow_origins)
            context = None if certificate is None else http_context(certificate)
            protocol = partial(BoundedProtocol, read_timeout_s=read_timeout_s)
            async with _serving(checked, protocol, listeners, grace_s, context, http_metrics):
                yield listeners[0].getsockname()[1]


@asynccontextmanager
async def running_metrics(
    host: str, port: int, page: MetricsPage, certificate: ServerCertificate | None
) -> AsyncIterator[int]:
    """Serves only `/metrics` inside the block and yields the port. Raises SettingsError if it cannot listen on it."""
    app = Starlette()
    page.add_to(app)
    with listening(host, port, "--metrics-port") as listeners:
        context = None if certificate is None else http_context(certificate)
        checked = HeaderMiddleware(app, _accepted_hosts(listeners, [host]), ())
        protocol = partial(BoundedProtocol, read_timeout_s=_PAGE_TIMEOUT_S)
        async with _serving(checked, protocol, listeners, 0, context):
            yield listeners[0].getsockname()[1]


def _checked(app: FastAPI, tracer: Tracer | None, hosts: list[str] | None, origins: Sequence[str]) -> ASGIApp:
    """Returns the application behind what checks and traces its requests."""
    app.add_middleware(TraceMiddleware, tracer=tracer)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["retry-after", "retry-after-ms", "x-request-id", *RATE_LIMIT_HEADERS],
    )
    return ArrivalMiddleware(BodyMemoryMiddleware(HeaderMiddleware(PathMiddleware(app), hosts, origins)))


def _accepted_hosts(listeners: list[socket.socket], hosts: list[str]) -> list[str] | None:
    """Returns the names to accept in `Host`, or None for all if other machines reach the port."""
    is_local = all(ip_address(listener.getsockname()[0]).is_loopback for listener in listeners)
    return hosts if is_local else None


@asynccontextmanager
async def _serving(
    app: ASGIApp,
    protocol: Callable[..., asyncio.Protocol],
    listeners: list[socket.socket],
    grace_s: float,
    tls: ssl.SSLContext | None,
    metrics: HttpMetrics | None = None,
) -> AsyncIterator[None]:
    requests = GracePeriodMiddleware(app)
    measured = requests if metrics is None else MetricsMiddleware(requests, metrics)
    config = uvicorn.Config(
        AccessLogMiddleware(measured),
        http=protocol,  # type: ignore[arg-type]  # uvicorn only calls it
        ws="none",
        log_config=None,
        access_log=False,
        backlog=1,  # for asyncio; see `listeners.py`
        timeout_keep_alive=KEEP_ALIVE_TIMEOUT_S,
        timeout_graceful_shutdown=math.ceil(grace_s) + _ERROR_TIMEOUT_S,
        ssl_context_factory=None if tls is None else lambda *_: tls,
    )
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=listeners))
    ready = asyncio.create_task(server.ready.wait())
    try:
        await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running  # raises why it did not start
        yield
    finally:
        ready.cancel()
        server.should_exit = True
        await asyncio.wait({running}, timeout=grace_s)
        requests.end()
        await running


class _Server(uvicorn.Server):
    """A uvicorn server that signals when it is ready and leaves signal handling to the owner of the event loop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
