"""The process around the engine: ports, health, warm-up, the watchdog and the drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from opentelemetry.trace import Tracer

from mpt.v1 import text_generation_pb2 as pb
from mpt.v1 import text_generation_pb2_grpc as pb_grpc
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.load import LoadedModel, load_engine
from mpt_grpc.errors import InternalError, ModelError, SettingsError
from mpt_grpc.request import CacheOptions, GenerationRequest, SamplingParameters, StoppingCriteria
from mpt_grpc.server.interceptors import CallInterceptor
from mpt_grpc.server.servicer import TextGenerationServicer
from mpt_grpc.settings import ServerSettings, Settings
from mpt_grpc.telemetry import names
from mpt_grpc.telemetry.tracing import make_tracer_provider

SERVICE = pb.DESCRIPTOR.services_by_name["TextGenerationService"].full_name
_log = logging.getLogger(__name__)
_WATCH_INTERVAL_S = 1.0
# After a drain only idle calls, such as Health.Watch, are left.
_STOP_GRACE_S = 0.5


async def serve(settings: Settings, on_ready: Callable[[RunningServer], None]) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends what is still running at once.

    `on_ready` is called once, when health says SERVING. Raises SettingsError or ModelError if the start fails.
    """
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    async with running_server(settings) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        # What the start has made stays: a collection that looked through all of it would stop every stream for 150 ms.
        gc.collect()
        gc.freeze()
        on_ready(server)
        await stop.wait()
        _log.info("draining for at most %g s; a second signal ends it at once", settings.server.grace_s)
        await server.drain(hurry)


class RunningServer:
    """A server that answers."""

    def __init__(
        self, settings: Settings, port: int, engine: Engine, model: LoadedModel, servicer: TextGenerationServicer
    ) -> None:
        self.settings, self.port, self.engine, self.model = settings, port, engine, model
        self.http_port: int | None = None
        self._servicer = servicer
        self._health = health.aio.HealthServicer()
        self._draining = False

    @property
    def health(self) -> health_pb2_grpc.HealthServicer:
        return self._health

    async def drain(self, hurry: asyncio.Event | None = None) -> None:
        """Refuses new work and waits for what is running, at most the grace, or until `hurry` is set."""
        self._draining = True
        await self._health.enter_graceful_shutdown()
        self.engine.refuse("the server is draining; ask another one")
        waits = [asyncio.create_task(event.wait()) for event in (self._servicer.idle, hurry) if event is not None]
        await asyncio.wait(waits, timeout=self.settings.server.grace_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def watch(self) -> None:
        """Keeps health true: NOT_SERVING while the engine is stuck. Runs until cancelled."""
        while not self._draining:
            stuck = self.engine.is_stuck(self.settings.server.stall_timeout_s)
            await self.set_serving(not stuck)
            await asyncio.sleep(_WATCH_INTERVAL_S)

    async def set_serving(self, serving: bool) -> None:
        """Sets what health says, of the whole server and of the service."""
        statuses = health_pb2.HealthCheckResponse
        for service in ("", SERVICE):
            await self._health.set(service, statuses.SERVING if serving else statuses.NOT_SERVING)


@asynccontextmanager
async def running_server(settings: Settings) -> AsyncIterator[RunningServer]:
    """Binds the port, loads the model, warms it up and serves inside the block; then stops, ending what still runs."""
    provider = make_tracer_provider(settings.trace_file)
    try:
        async with _serving(settings, None if provider is None else provider.get_tracer(names.SCOPE)) as server:
            yield server
    finally:
        if provider is not None:
            await asyncio.to_thread(provider.shutdown)


@asynccontextmanager
async def _serving(settings: Settings, tracer: Tracer | None) -> AsyncIterator[RunningServer]:
    server = grpc.aio.server(interceptors=[CallInterceptor(tracer)], options=_channel_options(settings.server))
    port = _bind(server, settings.server)
    loop = asyncio.get_running_loop()
    engine, model = await asyncio.to_thread(load_engine, settings, tracer=tracer, loop=loop)
    servicer = TextGenerationServicer(engine, model, settings.scheduler, settings.server.max_message_bytes)
    running = RunningServer(settings, port, engine, model, servicer)
    pb_grpc.add_TextGenerationServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(running.health, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    with engine:
        try:
            await asyncio.to_thread(engine.generate, _WARM_UP)
        except InternalError as error:
            raise ModelError(f"the model fails at its first tokens: {error.__cause__!r}") from error
        await server.start()
        watch = asyncio.create_task(running.watch())
        try:
            async with _http(settings, port) as running.http_port:
                yield running
        finally:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
            # The engine first: what still runs ends with its error, which says why.
            await asyncio.to_thread(engine.close)
            await server.stop(_STOP_GRACE_S)


@asynccontextmanager
async def _http(settings: Settings, grpc_port: int) -> AsyncIterator[int | None]:
    """OpenAI's API beside the gRPC port, as a client of it; gives its port, None if there is none."""
    if settings.http.port is None:
        yield None
        return
    # Imported here: who has no use for it does not wait for it.
    from mpt_grpc.gateway.serve import running_gateway

    host = settings.server.host
    target = f"{'localhost' if host in ('0.0.0.0', '::') else settings.server.bracketed_host}:{grpc_port}"
    async with running_gateway(target, host, settings.http) as port:
        yield port


_WARM_UP = GenerationRequest(
    request_id="warm-up",
    prompt=(0,),
    sampling=SamplingParameters(temperature=0),
    stopping=StoppingCriteria(max_new_tokens=2, ignore_eos=True),
    cache=CacheOptions(bypass=True),
)


def _bind(server: grpc.aio.Server, settings: ServerSettings) -> int:
    try:
        return server.add_insecure_port(f"{settings.bracketed_host}:{settings.port}")
    except RuntimeError as error:
        raise SettingsError(
            f"--port: cannot listen on {settings.host}:{settings.port}: is --host an address of this machine, and the"
            " port free? 0 takes a free one"
        ) from error


def _channel_options(settings: ServerSettings) -> list[tuple[str, int]]:
    return [
        # Off, or a second server would share the port without a word.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # A client may ping through a long call without being sent away.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
        ("grpc.http2.max_ping_strikes", 0),
    ]
