"""The HTTP ports of a server: the OpenAI-compatible API, as a client of the server, and the page of the metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import grpc
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry

from mpt_grpc.access import Access
from mpt_grpc.settings import Settings
from mpt_grpc.telemetry.metrics import HttpMetrics
from mpt_grpc.tls import ServerCertificate


class HttpPorts(NamedTuple):
    """The ports that are served; None for those that are not."""

    http: int | None = None
    metrics: int | None = None


@asynccontextmanager
async def serving_http(
    settings: Settings,
    target: str,
    channel: grpc.aio.Channel,
    certificate: ServerCertificate | None,
    tracer: Tracer | None,
    metrics: tuple[CollectorRegistry, Access] | None,
    http_metrics: HttpMetrics,
) -> AsyncIterator[HttpPorts]:
    """Serves on the ports in the settings inside the block, and yields them. Raises SettingsError.

    metrics: what `/metrics` shows, and to whom; None serves no such page.
    http_metrics: measures the requests to the OpenAI-compatible API.
    """
    if not settings.serves_http:
        yield HttpPorts()
        return
    # Imported here, so that a server without HTTP does not wait for it.
    from mpt_grpc.gateway.metrics import MetricsPage
    from mpt_grpc.gateway.serve import running_gateway, running_metrics

    http_port, metrics_port = settings.http.port, settings.telemetry.metrics_port
    host, ports = settings.server.host, HttpPorts()
    page = None if metrics is None else MetricsPage(*metrics)
    async with AsyncExitStack() as stack:
        if metrics_port is not None and page is not None:
            port = await stack.enter_async_context(running_metrics(host, metrics_port, page, certificate))
            ports = ports._replace(metrics=port)
        if http_port is not None:
            gateway = running_gateway(
                target,
                host,
                settings.http,
                read_timeout_s=settings.server.read_timeout_s,
                certificate=certificate,
                channel=channel,
                tracer=tracer,
                metrics=page,
                http_metrics=http_metrics,
            )
            ports = ports._replace(http=await stack.enter_async_context(gateway))
        yield ports
