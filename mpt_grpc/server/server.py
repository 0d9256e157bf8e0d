"""The process around the engine: the port or the socket, the warm-up, health and shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry

from mpt_grpc.access import Access
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.load import LoadedModel, load_engine
from mpt_grpc.errors import DrainingError, UnavailableError
from mpt_grpc.listening import exposure
from mpt_grpc.server.allocator import trim
from mpt_grpc.server.channel_options import channel_options
from mpt_grpc.server.garbage import GarbageCollection
from mpt_grpc.server.health import Health
from mpt_grpc.server.http import serving_http
from mpt_grpc.server.interceptors import DEBUG_SERVICE, SERVICE, CallInterceptor
from mpt_grpc.server.local_channel import LocalChannel
from mpt_grpc.server.observing import make_telemetry, measure_lag
from mpt_grpc.server.ports import listening
from mpt_grpc.server.servicer import DebugServicer, TextGenerationServicer
from mpt_grpc.server.sizes import MessageLimits
from mpt_grpc.server.warm_up import warm_up
from mpt_grpc.server.writes import PendingWrites
from mpt_grpc.settings import Settings
from mpt_grpc.telemetry import names
from mpt_grpc.telemetry.exporting import make_meter_provider, make_tracer_provider, shut_down
from mpt_grpc.telemetry.metrics import HttpMetrics
from mpt_grpc.tls import ServerCertificate, server_certificate
from mpt_grpc.wake_ups import gathered_wake_ups
from mpt_grpc_client.proto.v1 import text_generation_pb2_grpc as pb_grpc
from mpt_grpc_client.proto.v1alpha1 import debug_pb2_grpc

_log = logging.getLogger(__name__)
LIVE = "live"
"""The service whose health is NOT_SERVING if the process should be replaced."""
_WATCH_INTERVAL_S = 1.0
# After a drain only idle calls, such as Health.Watch, remain.
_STOP_GRACE_S = 0.5
_STOP_TIMEOUT_S = 5.0
_SWITCH_INTERVAL_S = 0.001
"""How long a thread may keep Python's global lock while others wait, a fifth of Python's default. A step gives it up
with each call of a kernel or of PyTorch, and then waits for a thread that tokenizes a text or builds a message."""


async def serve(settings: Settings, on_ready: Callable[[RunningServer], None]) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal cancels the remaining requests.

    `on_ready` is called once, when health reports SERVING. Raises SettingsError or ModelError if the start fails, and
    UnavailableError when the engine fails, or when gRPC's server does, after a drain. If the engine still computes some
    seconds after it was to stop, the process exits with status 1.
    """
    loop = asyncio.get_running_loop()
    drain, stop = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (stop if drain.is_set() else drain).set()

    # Nothing can interrupt a step that hangs, and closing the engine waits for it.
    exiting = threading.Timer(_STOP_TIMEOUT_S, _exit_without_engine)
    exiting.daemon = True
    try:
        async with running_server(settings) as server:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, on_signal)
            server.garbage = GarbageCollection()
            sys.setswitchinterval(_SWITCH_INTERVAL_S)
            on_ready(server)
            await _first(drain, server.has_failed)
            if server.engine.failure is None:
                _log.info(
                    "draining: waiting up to %g s for requests in progress; send the signal again to stop immediately",
                    settings.server.grace_s,
                )
                await server.drain(stop)
            exiting.start()
    finally:
        exiting.cancel()
    if (failure := server.failure) is not None:
        raise failure
    _log.info("stopped")


def _exit_without_engine() -> None:
    _log.error("the engine has not stopped within %g s: exiting without it", _STOP_TIMEOUT_S)
    os._exit(1)


async def _first(*events: asyncio.Event | None, timeout_s: float | None = None) -> None:
    """Waits until one of the events is set, or the time is over."""
    waits = [asyncio.create_task(event.wait()) for event in events if event is not None]
    await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


class RunningServer:
    """A server that accepts calls."""

    def __init__(
        self,
        settings: Settings,
        server: grpc.aio.Server,
        target: str,
        channel: grpc.aio.Channel,
        engine: Engine,
        model: LoadedModel,
        servicer: TextGenerationServicer,
        access: Access,
        writes: PendingWrites,
    ) -> None:
        self.settings, self.target, self.engine, self.model = settings, target, engine, model
        self.channel = channel
        """A channel to this server for callers on its event loop, who need no connection."""
        self.http_port: int | None = None
        self.metrics_port: int | None = None
        self.channelz_port: int | None = None
        self.garbage: GarbageCollection | None = None
        """Set in a process of the server's own."""
        self.grpc_servers = [server]
        """All of gRPC's, of which none may end."""
        self._servicer, self._access, self._writes = servicer, access, writes
        self._grpc_failure: UnavailableError | None = None
        self.has_failed = asyncio.Event()
        """Set when there is a `failure`."""
        self.health = Health()
        self._draining = False

    async def drain(self, stop: asyncio.Event | None = None) -> None:
        """Refuses new requests and waits for those in progress, up to the grace period or until `stop` is set."""
        self._draining = True
        self._update_health()
        self.engine.refuse(DrainingError("the server is shutting down; use another server"))
        await _first(self._servicer.idle, stop, timeout_s=self.settings.server.grace_s)

    @property
    def failure(self) -> UnavailableError | None:
        """Why only a new process can serve again: the engine, or gRPC's server, has ended by itself."""
        return self.engine.failure or self._grpc_failure

    async def watch(self) -> None:
        """Updates health, reads access tokens again if their file has changed, ends streams that are not read, notices
        failures, and frees memory when idle. Runs until cancelled."""
        while True:
            try:
                await self._check()
            except Exception:  # such as that no thread can be started: the next time may be better
                _log.exception("the server could not check itself")
            await asyncio.sleep(_WATCH_INTERVAL_S)

    async def _check(self) -> None:
        self._update_health()
        self._writes.end_unread(self.settings.server.read_timeout_s)
        for server in self.grpc_servers:
            self._grpc_failure = self._grpc_failure or await _failure(server)
        if self.failure is not None:
            self.has_failed.set()
        await asyncio.to_thread(self._access.refresh)
        if not self.engine.num_in_flight:
            if self.garbage is not None:
                self.garbage.collect_when_idle(self.engine.load.num_steps)
            await asyncio.to_thread(trim)

    def _update_health(self) -> None:
        """Sets the health of the process, and of the server and its service, which also stop serving in a drain."""
        is_live = not self.engine.is_stalled(self.settings.server.stall_timeout_s)
        self.health.set(LIVE, is_serving=is_live)
        for service in ("", SERVICE):
            self.health.set(service, is_serving=is_live and not self._draining)


@asynccontextmanager
async def running_server(settings: Settings) -> AsyncIterator[RunningServer]:
    """Listens, loads the model, warms it up and serves inside the block; then cancels the remaining requests."""
    registry = CollectorRegistry() if settings.serves_http else None
    meters = make_meter_provider(registry)
    tracers = make_tracer_provider(settings.telemetry.trace_file, meters)
    if settings.telemetry.trace_steps is not None and tracers is None:
        _log.warning("--trace-steps has no effect without --trace-file or OTEL_EXPORTER_OTLP_ENDPOINT")
    try:
        async with _serving(settings, tracers, meters, None if meters is None else registry) as server:
            yield server
    finally:
        await asyncio.to_thread(shut_down, tracers, meters)


@asynccontextmanager
async def _serving(
    settings: Settings,
    tracers: TracerProvider | None,
    meters: MeterProvider | None,
    registry: CollectorRegistry | None,
) -> AsyncIterator[RunningServer]:
    access, tls = Access(settings.server.tokens_file), settings.server.tls
    interceptor = CallInterceptor(access)
    certificate = None if tls is None else server_certificate(tls)
    _warn_of_exposure(settings, access)
    with gathered_wake_ups(asyncio.get_running_loop()):
        server = grpc.aio.server(interceptors=[interceptor], options=channel_options(settings))
    with listening(server, settings.server, certificate) as target:
        engine, model = await asyncio.to_thread(load_engine, settings, loop=asyncio.get_running_loop())
        interceptor.message_limits = MessageLimits(engine.preparation.limits)
        interceptor.telemetry = telemetry = make_telemetry(
            engine, model, tracers, meters, settings.telemetry.trace_steps
        )
        servicer = TextGenerationServicer(
            engine, model, settings.scheduler, interceptor.message_limits, interceptor.messages
        )
        channel = LocalChannel(interceptor)
        running = RunningServer(settings, server, target, channel, engine, model, servicer, access, interceptor.writes)
        debug = DebugServicer(engine, model)
        for callee in (server, channel):
            _add_services(callee, servicer, debug, running.health)
        if settings.server.reflection:
            services = (SERVICE, DEBUG_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(services, server)
        with engine:
            await asyncio.to_thread(warm_up, engine)
            engine.observe(telemetry)
            tasks = [asyncio.create_task(measure_lag(telemetry.metrics))]
            try:
                await server.start()
                tasks.append(asyncio.create_task(running.watch()))
                page = None if registry is None else (registry, access)
                http_metrics = HttpMetrics((meters or NoOpMeterProvider()).get_meter(names.SCOPE))
                async with _other_ports(running, certificate, telemetry.tracer, page, http_metrics):
                    yield running
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                # The engine stops first, so that the remaining calls end with its error, which gives the reason.
                await asyncio.to_thread(engine.close)
                await engine.delivered()  # before the spans and metrics of the last requests are exported
                interceptor.hasten()
                await server.stop(_STOP_GRACE_S)


@asynccontextmanager
async def _other_ports(
    running: RunningServer,
    certificate: ServerCertificate | None,
    tracer: Tracer | None,
    metrics: tuple[CollectorRegistry, Access] | None,
    http_metrics: HttpMetrics,
) -> AsyncIterator[None]:
    """Serves channelz and HTTP inside the block, as far as the settings ask for them. Raises SettingsError."""
    settings, channel = running.settings, running.channel
    async with AsyncExitStack() as stack:
        if settings.telemetry.channelz_port is not None:
            from mpt_grpc.server.channelz import serving_channelz  # which few servers need

            serving = serving_channelz(settings.telemetry.channelz_port)
            debug_server, running.channelz_port = await stack.enter_async_context(serving)
            running.grpc_servers.append(debug_server)
        await stack.enter_async_context(channel)
        running.http_port, running.metrics_port = await stack.enter_async_context(
            serving_http(settings, running.target, channel, certificate, tracer, metrics, http_metrics)
        )
        yield


async def _failure(server: grpc.aio.Server) -> UnavailableError | None:
    """Returns why gRPC's server accepts no more connections, as after a call whose path is not UTF-8."""
    try:
        await server.wait_for_termination(0)
    except Exception as error:
        return UnavailableError(f"gRPC's server has ended: {error}")
    return None


def _warn_of_exposure(settings: Settings, access: Access) -> None:
    """Logs what protection a server lacks that other machines can reach."""
    tls = settings.server.tls
    identifies_callers = access.requires_token or (tls is not None and tls.client_ca is not None)
    missing = {"TLS (--tls-cert)": tls is None, "access tokens (--tokens-file)": not identifies_callers}
    listens_on_host = settings.server.grpc_socket is None or settings.serves_http
    if listens_on_host and (warning := exposure(settings.server.host, missing)):
        _log.warning("%s", warning)


def _add_services(callee: Any, servicer: TextGenerationServicer, debug: DebugServicer, health_servicer: Health) -> None:
    """Adds the services that are called over connections and over the channel inside of the process."""
    pb_grpc.add_TextGenerationServiceServicer_to_server(servicer, callee)
    debug_pb2_grpc.add_DebugServiceServicer_to_server(debug, callee)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, callee)
