"""`mpt-grpc gateway`: the OpenAI-compatible API and the web page, in a process separate from the engine's."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from mpt_grpc.access import Access
from mpt_grpc.commands import listening_options, logs
from mpt_grpc.commands.connection import connection_options
from mpt_grpc.gateway.metrics import MetricsPage
from mpt_grpc.gateway.serve import running_gateway
from mpt_grpc.listening import exposure
from mpt_grpc.settings import HttpSettings, ServerSettings
from mpt_grpc.telemetry import names
from mpt_grpc.telemetry.exporting import make_meter_provider, make_tracer_provider, shut_down
from mpt_grpc.telemetry.metrics import HttpMetrics
from mpt_grpc.tls import server_certificate
from mpt_grpc_client import ConnectionOptions
from mpt_grpc_client.channel import resolve
from mpt_grpc_client.targets import resolve_targets

_log = logging.getLogger(__name__)
_SERVICE = "mpt-grpc-gateway"


def run(parsed: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT, then lets requests finish; a second signal ends the process.

    Raises SettingsError for an invalid setting or a port in use.
    """
    logs.configure(parsed.log_level, parsed.log_format)
    server = ServerSettings(
        host=parsed.host,
        tls=listening_options.tls_settings(parsed),
        grace_s=parsed.grace,
        read_timeout_s=parsed.read_timeout,
    )
    http, connection = listening_options.http_settings(parsed, parsed.http_port), connection_options(parsed)
    if warning := exposure(server.host, {"TLS (--tls-cert)": server.tls is None}):
        _log.warning("%s", warning)
    for endpoint in resolve(parsed.target, connection):
        if not endpoint.may_send_tokens:
            why = f"{endpoint.target} is another machine, reached without TLS; use grpcs:// or --allow-insecure-token"
            _log.warning("access tokens of callers are not passed on: %s", why)
            break
    asyncio.run(_serve(resolve_targets(parsed.target), server, http, connection))


async def _serve(
    targets: Sequence[str], server: ServerSettings, http: HttpSettings, connection: ConnectionOptions
) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    certificate = None if server.tls is None else server_certificate(server.tls)
    registry = CollectorRegistry()
    meters = make_meter_provider(registry, service=_SERVICE)
    tracers = make_tracer_provider(None, meters, service=_SERVICE)
    async with running_gateway(
        targets,
        server.host,
        http,
        server.grace_s,
        read_timeout_s=server.read_timeout_s,
        certificate=certificate,
        tracer=None if tracers is None else tracers.get_tracer(names.SCOPE),
        # Here, every caller whom a server accepts may read the counts of requests: see CallerMiddleware.
        metrics=None if meters is None else MetricsPage(registry, Access(None)),
        http_metrics=None if meters is None else HttpMetrics(meters.get_meter(names.SCOPE)),
        **connection,
    ) as port:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        url = server.url(port)
        welcome = (
            f"mpt-grpc gateway for {', '.join(targets)}",
            f"  OpenAI    {url}/v1",
            f"  web page  {url}/",
            f"  try       curl {url}/v1/models",
        )
        print("\n".join(welcome), flush=True)
        await stop.wait()
        _log.info("draining: waiting up to %g s for requests in progress", server.grace_s)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    shut_down(tracers, meters)
    _log.info("stopped")
