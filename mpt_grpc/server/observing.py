"""What is measured of a server: the load of its engine, the work that the engine reports, and its event loop."""

from __future__ import annotations

import asyncio
import time

from opentelemetry.metrics import MeterProvider, NoOpMeterProvider
from opentelemetry.sdk.trace import TracerProvider

from mpt_grpc import __version__
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.load import LoadedModel
from mpt_grpc.server.status import REASONS
from mpt_grpc.telemetry import names
from mpt_grpc.telemetry.metrics import Metrics
from mpt_grpc.telemetry.observer import Telemetry

_LAG_INTERVAL_S = 0.25


def make_telemetry(
    engine: Engine,
    model: LoadedModel,
    tracers: TracerProvider | None,
    meters: MeterProvider | None,
    trace_interval: int | None,
) -> Telemetry:
    """Returns the recorder of a server's spans and metrics, including gauges of its engine."""
    metrics = Metrics((meters or NoOpMeterProvider()).get_meter(names.SCOPE), model.name, REASONS)
    _observe_load(metrics, engine, model)
    tracer = None if tracers is None else tracers.get_tracer(names.SCOPE)
    return Telemetry(metrics, tracer, trace_interval)


async def measure_lag(metrics: Metrics) -> None:
    """Measures how late the event loop runs a timer, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _LAG_INTERVAL_S
        await asyncio.sleep(_LAG_INTERVAL_S)
        metrics.record_lag(max(0.0, loop.time() - due_s))


def _observe_load(metrics: Metrics, engine: Engine, model: LoadedModel) -> None:
    """Adds the gauges and counters that are read from `Engine.load`, a frozen value, when metrics are collected."""
    gauge, count = metrics.observe, metrics.observe_count
    blocks = model.num_blocks
    gauge(names.REQUESTS_RUNNING, "{request}", "Outputs in the batch", lambda: engine.load.num_running)
    gauge(names.REQUESTS_WAITING, "{request}", "Outputs in the queue", lambda: engine.load.num_waiting)
    gauge(names.REQUESTS_PREPARING, "{request}", "Requests being prepared", lambda: engine.load.num_preparing)
    gauge(
        names.KV_CACHE_USAGE,
        "1",
        "Fraction of the KV cache blocks that requests use",
        lambda: 1 - engine.load.num_free_blocks / blocks,
    )
    gauge(names.KV_CACHE_BLOCKS, "{block}", "KV cache blocks", lambda: blocks)
    count(names.STEPS, "{step}", "Steps, including that of the warm-up", lambda: engine.load.num_steps)
    count(names.GENERATED_TOKENS, "{token}", "Generated tokens", lambda: engine.load.num_generated_tokens)
    count(names.PREEMPTED, "{sequence}", "Preemptions of sequences", lambda: engine.load.num_preemptions)
    count(names.SPECULATION_DRAFTS, "{token}", "Drafts checked", lambda: engine.load.num_draft_tokens)
    count(names.SPECULATION_ACCEPTED, "{token}", "Drafts accepted", lambda: engine.load.num_accepted_tokens)
    start_s = time.monotonic()
    gauge(names.UPTIME, "s", "How long the server has been running", lambda: time.monotonic() - start_s)
    build = {
        names.BUILD_VERSION: __version__,
        names.REQUEST_MODEL: model.name,
        names.BUILD_DEVICE: model.device,
        names.BUILD_DTYPE: model.dtype,
    }
    gauge(names.BUILD, "", "The version of the server and its model", lambda: 1, attributes=build)
