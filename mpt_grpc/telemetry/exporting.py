"""Where spans and metrics are exported, as OpenTelemetry's standard variables say."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import MeterProvider as AnyMeterProvider
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.environment_variables import OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from prometheus_client import CollectorRegistry

from mpt_grpc import __version__
from mpt_grpc.errors import SettingsError
from mpt_grpc.telemetry.trace_file import TraceFile

EXPORT_TIMEOUT_S = 2.0
"""How long a process waits for collectors when it ends."""
_Signal = Literal["TRACES", "METRICS"]


def make_tracer_provider(
    trace_file: Path | None, meter_provider: AnyMeterProvider | None = None, *, service: str = "mpt-grpc"
) -> TracerProvider | None:
    """Returns a provider that exports to the OTLP endpoint in the environment, and to `trace_file` if given.

    Returns None, which disables tracing, if there is neither or OTEL_SDK_DISABLED is true. OpenTelemetry itself reads
    the other standard variables, such as those of the sampler. A thread exports the spans from a queue of bounded size;
    `meter_provider` counts those that are dropped. Raises SettingsError for an unsupported variable or an unwritable
    file.
    """
    if _is_disabled():
        return None
    meters = meter_provider or NoOpMeterProvider()
    _enable_own_metrics()
    exporters: list[SpanExporter] = []
    with _refusing_variables():
        match _otlp_protocol("TRACES"):
            case "grpc":
                exporters.append(GrpcSpanExporter(meter_provider=meters))
            case "http/protobuf":
                exporters.append(HttpSpanExporter(meter_provider=meters))
    if trace_file is not None:
        try:
            exporters.append(TraceFile(trace_file))
        except OSError as error:
            raise SettingsError(f"--trace-file: cannot write {trace_file}: {error.strerror}") from error
    if not exporters:
        return None
    with _refusing_variables():
        provider = TracerProvider(resource=_resource(service), shutdown_on_exit=False, meter_provider=meters)
        for exporter in exporters:
            provider.add_span_processor(BatchSpanProcessor(exporter, meter_provider=meters))
    return provider


def make_meter_provider(registry: CollectorRegistry | None, *, service: str = "mpt-grpc") -> MeterProvider | None:
    """Returns a provider that exports to the OTLP endpoint in the environment, and to `registry` if given.

    Returns None, which disables metrics, if there is neither or OTEL_SDK_DISABLED is true. Raises SettingsError for an
    unsupported variable.
    """
    if _is_disabled():
        return None
    _enable_own_metrics()
    readers: list[MetricReader] = []
    with _refusing_variables():
        match _otlp_protocol("METRICS"):
            case "grpc":
                readers.append(PeriodicExportingMetricReader(GrpcMetricExporter()))
            case "http/protobuf":
                readers.append(PeriodicExportingMetricReader(HttpMetricExporter()))
        if registry is not None:
            readers.append(PrometheusMetricReader(scope_info_enabled=False, registry=registry))
        return MeterProvider(readers, _resource(service), shutdown_on_exit=False) if readers else None


def shut_down(*providers: TracerProvider | MeterProvider | None, timeout_s: float = EXPORT_TIMEOUT_S) -> None:
    """Exports what remains, and gives up after `timeout_s`: a collector that is down must not delay the exit."""
    end_s = time.monotonic() + timeout_s
    shutdowns = [provider.shutdown for provider in providers if provider is not None]
    threads = [threading.Thread(target=shutdown, name="export", daemon=True) for shutdown in shutdowns]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end_s - time.monotonic()))


def _is_disabled() -> bool:
    return os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"


def _enable_own_metrics() -> None:
    """Has OpenTelemetry count the spans that it drops, which it does only by this variable."""
    os.environ.setdefault(OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED, "true")


def _resource(service: str) -> Resource:
    # The environment's OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence.
    resource = Resource({SERVICE_NAME: service, SERVICE_VERSION: __version__}).merge(OTELResourceDetector().detect())
    return Resource.create().merge(resource)


@contextmanager
def _refusing_variables() -> Iterator[None]:
    """Turns OpenTelemetry's error for the value of a variable into one that names the variable."""
    try:
        yield
    except SettingsError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())
        # It contains the value, or the name of an argument, such as max_queue_size for OTEL_BSP_MAX_QUEUE_SIZE.
        arguments = tuple(re.findall(r"[a-z]+(?:_[a-z]+)+", why))
        named = [
            name
            for name, value in os.environ.items()
            if name.startswith("OTEL_") and value and (value in why or name.lower().endswith(arguments))
        ]
        raise SettingsError(f"{' or '.join(sorted(named)) or 'the OTEL_ variables'}: {why}") from error


def _otlp_protocol(signal: _Signal) -> str | None:
    """Returns the protocol by which a signal is exported, or None if it is not. Raises SettingsError."""
    kind = os.environ.get(f"OTEL_{signal}_EXPORTER") or "otlp"
    if kind not in ("otlp", "none"):
        raise SettingsError(f"OTEL_{signal}_EXPORTER: {kind!r} is not supported; use otlp or none")
    endpoint_name, endpoint = _variable(signal, "ENDPOINT", "")
    if kind == "none" or not endpoint:
        return None
    name, protocol = _variable(signal, "PROTOCOL", "grpc")
    if protocol not in ("grpc", "http/protobuf"):
        raise SettingsError(f"{name}: {protocol!r} is not supported; use grpc or http/protobuf")
    if protocol == "http/protobuf" and not endpoint.startswith(("http://", "https://")):
        raise SettingsError(f"{endpoint_name}: {endpoint!r} is not a URL, such as http://localhost:4318")
    for kind in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE"):
        name, file = _variable(signal, kind, "")
        if file and not os.access(file, os.R_OK):
            # OpenTelemetry would go on without it.
            raise SettingsError(f"{name}: cannot read {file}")
    return protocol


def _variable(signal: _Signal, kind: str, default: str) -> tuple[str, str]:
    """Returns the name of the variable that applies to a signal, and its value."""
    own, common = f"OTEL_EXPORTER_OTLP_{signal}_{kind}", f"OTEL_EXPORTER_OTLP_{kind}"
    return next(((name, value) for name in (own, common) if (value := os.environ.get(name))), (common, default))
