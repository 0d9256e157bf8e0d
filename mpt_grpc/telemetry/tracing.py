"""Exporting of spans, and the spans for a request's phases.

Contexts are passed as arguments because the scheduler thread has no current span.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpanExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Tracer
from opentelemetry.util.types import AttributeValue

from mpt_grpc import __version__
from mpt_grpc.errors import SettingsError
from mpt_grpc.request import Conversation, GenerationRequest, RequestStats
from mpt_grpc.telemetry import names


def make_tracer_provider(trace_file: Path | None) -> TracerProvider | None:
    """Returns a provider that exports to the OTLP endpoint in the environment, and to `trace_file` if given.

    Returns None, which disables tracing, if there is neither or OTEL_SDK_DISABLED is true. OpenTelemetry itself reads
    the other standard variables. Raises SettingsError for an unsupported variable or a file that cannot be written.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    exporters: list[SpanExporter] = []
    if (otlp := _otlp_exporter()) is not None:
        exporters.append(otlp)
    if trace_file is not None:
        try:
            out = trace_file.open("a", encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"--trace-file: cannot write {trace_file}: {error.strerror}") from error
        exporters.append(ConsoleSpanExporter(out=out, formatter=lambda span: span.to_json(indent=None) + "\n"))
    if not exporters:
        return None
    # The environment's OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES take precedence.
    resource = Resource({SERVICE_NAME: "mpt-grpc", SERVICE_VERSION: __version__}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=Resource.create().merge(resource), shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def shut_down(provider: TracerProvider, timeout_s: float) -> None:
    """Exports the remaining spans, and gives up after `timeout_s`: a collector that is down must not delay the exit."""
    thread = threading.Thread(target=provider.shutdown, name="export-spans", daemon=True)
    thread.start()
    thread.join(timeout_s)


def _otlp_exporter() -> SpanExporter | None:
    if not any(os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT") for signal in ("", "TRACES_")):
        return None
    kind = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    if kind == "none":
        return None
    if kind != "otlp":
        raise SettingsError(f"OTEL_TRACES_EXPORTER: {kind!r} is not supported; use otlp or none")
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    name = next((name for name in variables if os.environ.get(name)), variables[1])
    match os.environ.get(name, "grpc"):
        case "grpc":
            return GrpcSpanExporter()
        case "http/protobuf":
            return HttpSpanExporter()
        case protocol:
            raise SettingsError(f"{name}: {protocol!r} is not supported; use grpc or http/protobuf")


def record_phases(tracer: Tracer, context: Context, stats: RequestStats) -> None:
    """Records the spans `queue`, `prefill` and `decode` of an ended request as children of the span in `context`."""
    queue_end = stats.scheduled_time_s or stats.end_time_s
    _span(tracer, context, names.SPAN_QUEUE, stats.arrival_time_s, queue_end, {})
    if stats.scheduled_time_s is None:
        return
    prefill_end = stats.first_token_time_s or stats.end_time_s
    prefill = {names.USAGE_INPUT_TOKENS: stats.num_prompt_tokens, names.CACHED_TOKENS: stats.num_cached_tokens}
    _span(tracer, context, names.SPAN_PREFILL, stats.scheduled_time_s, prefill_end, prefill)
    if stats.first_token_time_s is not None:
        decode = {names.USAGE_OUTPUT_TOKENS: stats.num_output_tokens, names.PREEMPTIONS: stats.num_preemptions}
        _span(tracer, context, names.SPAN_DECODE, stats.first_token_time_s, stats.end_time_s, decode)


def request_attributes(request: GenerationRequest, model: str) -> Mapping[str, AttributeValue]:
    """Returns the GenAI attributes of a request, leaving out options that are not set."""
    sampling, decoding = request.sampling, request.decoding
    attributes: dict[str, AttributeValue] = {
        names.OPERATION: "chat" if isinstance(request.prompt, Conversation) else "text_completion",
        names.PROVIDER: "mpt-grpc",
        names.REQUEST_MODEL: model,
        names.REQUEST_ID: request.request_id,
        names.RESPONSE_ID: request.request_id,
        names.REQUEST_TEMPERATURE: sampling.temperature,
        names.REQUEST_TOP_P: sampling.top_p,
        names.REQUEST_TOP_K: sampling.top_k,
    }
    if sampling.num_sequences != 1:
        attributes[names.REQUEST_CHOICE_COUNT] = sampling.num_sequences
    if decoding.frequency_penalty:
        attributes[names.REQUEST_FREQUENCY_PENALTY] = decoding.frequency_penalty
    if decoding.presence_penalty:
        attributes[names.REQUEST_PRESENCE_PENALTY] = decoding.presence_penalty
    if sampling.seed is not None:
        # Attributes are int64; a seed is uint64.
        attributes[names.REQUEST_SEED] = str(sampling.seed)
    if request.stopping.max_new_tokens is not None:
        attributes[names.REQUEST_MAX_TOKENS] = request.stopping.max_new_tokens
    return attributes


def _span(
    tracer: Tracer, context: Context, name: str, start_s: float, end_s: float, attributes: Mapping[str, AttributeValue]
) -> None:
    span = tracer.start_span(name, context=context, start_time=int(start_s * 1e9), attributes=attributes)
    span.end(int(end_s * 1e9))
