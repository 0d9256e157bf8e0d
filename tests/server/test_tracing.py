"""Traces from the caller's span to the phases of the engine, and where the spans are exported."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import demo_settings
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from otlp_collector import Collector, running_collector

from mpt_grpc.errors import SettingsError
from mpt_grpc.server.server import running_server
from mpt_grpc.settings import TelemetrySettings
from mpt_grpc.telemetry.exporting import make_meter_provider, make_tracer_provider, shut_down
from mpt_grpc_client import AsyncClient
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

TRACE_ID, CALLER_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
FROM_CALLER = (("traceparent", f"00-{TRACE_ID}-{CALLER_ID}-01"),)
RPC = "mpt.v1.TextGenerationService/"


def generate_request(max_new_tokens: int = 5, **fields: Any) -> pb.GenerateRequest:
    stopping = pb.StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True)
    return pb.GenerateRequest(**{"text": "Once upon a time", "stopping": stopping, **fields})


@asynccontextmanager
async def stub_of_server(trace_file: Path | None) -> AsyncIterator[tuple[Any, str]]:
    """Yields a stub and the target of a server. Its spans are in the file after the block."""
    async with running_server(replace(demo_settings(), telemetry=TelemetrySettings(trace_file=trace_file))) as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            yield TextGenerationServiceStub(channel), server.target


def spans_in(trace_file: Path, trace_id: str) -> dict[str, dict[str, Any]]:
    spans = [json.loads(line) for line in trace_file.read_text(encoding="utf-8").splitlines()]
    return {span["name"]: span for span in spans if span["context"]["trace_id"] == f"0x{trace_id}"}


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
async def test_the_callers_trace_contains_the_call_and_its_phases(tmp_path: Path, method: str) -> None:
    trace_file = tmp_path / "spans.jsonl"
    request = generate_request(
        request_id="traced",
        sampling=pb.SamplingParameters(temperature=0.5, top_p=0.25, top_k=40, seed=2**64 - 1),
    )
    async with stub_of_server(trace_file) as (stub, _):
        call = getattr(stub, method)(request, metadata=FROM_CALLER)
        response = await call if method == "Generate" else [chunk async for chunk in call][-1]
    assert response.summary.trace_id == TRACE_ID

    spans = spans_in(trace_file, TRACE_ID)
    assert set(spans) == {RPC + method, "queue", "prefill", "decode"}
    rpc = spans[RPC + method]
    assert (rpc["kind"], rpc["parent_id"]) == ("SpanKind.SERVER", f"0x{CALLER_ID}")
    assert rpc["resource"]["attributes"]["service.name"] == "mpt-grpc"
    num_prompt_tokens = response.summary.usage.num_prompt_tokens
    assert rpc["attributes"] == {
        "rpc.system.name": "grpc",
        "rpc.method": f"mpt.v1.TextGenerationService/{method}",
        "rpc.response.status_code": "OK",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "mpt-grpc",
        "gen_ai.request.model": "demo",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.25,
        "gen_ai.request.top_k": 40,
        "gen_ai.request.seed": "18446744073709551615",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.response.id": "traced",
        "gen_ai.response.finish_reasons": ["max_new_tokens"],
        "gen_ai.usage.input_tokens": num_prompt_tokens,
        "gen_ai.usage.output_tokens": 5,
        "mpt.request_id": "traced",
    }
    assert {spans[phase]["parent_id"] for phase in ("queue", "prefill", "decode")} == {rpc["context"]["span_id"]}
    assert spans["prefill"]["attributes"] == {"gen_ai.usage.input_tokens": num_prompt_tokens, "mpt.cached_tokens": 0}
    assert spans["decode"]["attributes"] == {
        "gen_ai.usage.output_tokens": 5,
        "mpt.preemptions": 0,
        "gen_ai.response.finish_reasons": ["max_new_tokens"],
    }
    assert spans["queue"]["end_time"] == spans["prefill"]["start_time"]
    assert spans["prefill"]["end_time"] == spans["decode"]["start_time"]


async def test_spans_of_failed_and_cancelled_calls_have_the_status(tmp_path: Path) -> None:
    trace_file = tmp_path / "spans.jsonl"
    cancelled_id = TRACE_ID[::-1]
    async with stub_of_server(trace_file) as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Generate(generate_request(5000), metadata=FROM_CALLER)
        cancelled = stub.StreamGenerate(
            generate_request(1000), metadata=(("traceparent", f"00-{cancelled_id}-{CALLER_ID}-01"),)
        )
        await anext(aiter(cancelled))
        cancelled.cancel()

    failed = spans_in(trace_file, TRACE_ID)
    assert set(failed) == {f"{RPC}Generate"}
    rpc = failed[f"{RPC}Generate"]
    assert rpc["status"]["status_code"] == "UNSET", "the caller is wrong, not the server"
    assert rpc["attributes"]["error.type"] == "INVALID_REQUEST"
    assert rpc["attributes"]["rpc.response.status_code"] == "INVALID_ARGUMENT"

    cancelled_spans = spans_in(trace_file, cancelled_id)
    assert set(cancelled_spans) == {f"{RPC}StreamGenerate", "queue", "prefill", "decode"}
    assert cancelled_spans[f"{RPC}StreamGenerate"]["attributes"]["rpc.response.status_code"] == "CANCELLED"
    assert cancelled_spans["decode"]["attributes"]["gen_ai.usage.output_tokens"] < 1000


async def test_the_client_library_propagates_its_span(tmp_path: Path) -> None:
    trace_file = tmp_path / "spans.jsonl"
    tracer = TracerProvider().get_tracer("caller")
    async with stub_of_server(trace_file) as (_, target), AsyncClient(target) as client:
        with tracer.start_as_current_span("work") as work:
            generation = await client.generate("Once upon a time", max_new_tokens=2)
    caller = work.get_span_context()
    assert generation.trace_id == f"{caller.trace_id:032x}"
    rpc = spans_in(trace_file, generation.trace_id)[f"{RPC}Generate"]
    assert rpc["parent_id"] == f"0x{caller.span_id:016x}"


async def test_a_call_without_a_trace_starts_one(tmp_path: Path) -> None:
    trace_file = tmp_path / "spans.jsonl"
    async with stub_of_server(trace_file) as (stub, _):
        responses = [await stub.Generate(generate_request(1)) for _ in range(2)]
    first, second = (response.summary.trace_id for response in responses)
    assert first != second
    assert spans_in(trace_file, first)[f"{RPC}Generate"]["parent_id"] is None


async def test_nothing_is_traced_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    async with stub_of_server(None) as (stub, _):
        response = await stub.Generate(generate_request(1), metadata=FROM_CALLER)
    assert response.summary.trace_id == ""


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector whose address is in the environment."""
    with running_collector() as (collector, endpoint):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        yield collector


async def test_spans_are_exported_to_the_collector_in_the_environment(collector: Collector) -> None:
    async with stub_of_server(None) as (stub, _):
        response = await stub.Generate(generate_request(), metadata=FROM_CALLER)
    assert response.summary.trace_id == TRACE_ID
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE_ID}
    assert sorted(span.name for span in collector.spans) == ["decode", f"{RPC}Generate", "prefill", "queue"]


@pytest.fixture
def http_collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the spans received by a collector for OTLP over HTTP, whose address is in the environment."""
    received: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            if self.path == "/v1/traces":
                request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
                received.extend(s.name for r in request.resource_spans for scope in r.scope_spans for s in scope.spans)
                received.extend(a.value.string_value for r in request.resource_spans for a in r.resource.attributes)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield received
        server.shutdown()
        thread.join()


async def test_the_protocol_and_the_service_name_of_the_environment_are_used(
    http_collector: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "stories")
    async with stub_of_server(None) as (stub, _):
        await stub.Generate(generate_request(), metadata=FROM_CALLER)
    assert {f"{RPC}Generate", "queue", "prefill", "decode", "stories"} <= set(http_collector)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
    ],
)
def test_an_unsupported_variable_is_refused_at_startup(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"^{variable}: '{value}' is not supported; use"):
        make_tracer_provider(None)


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"OTEL_EXPORTER_OTLP_TIMEOUT": "10s"}, "OTEL_EXPORTER_OTLP_TIMEOUT: could not convert string to float: '10s'"),
        ({"OTEL_EXPORTER_OTLP_COMPRESSION": "zstd"}, "OTEL_EXPORTER_OTLP_COMPRESSION: "),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "10"}, "OTEL_BSP_MAX_QUEUE_SIZE: max_export_batch_size must be"),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE": "/no/ca"},
            "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE: cannot read /no/ca",
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
            "OTEL_EXPORTER_OTLP_ENDPOINT: 'collector:4318' is not a URL, such as http://localhost:4318",
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "", "OTEL_TRACES_EXPORTER": "console"},
            "OTEL_TRACES_EXPORTER: 'console' is not",
        ),
    ],
)
def test_a_variable_with_which_nothing_would_be_exported_is_refused_at_startup(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], why: str
) -> None:
    for name, value in ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"^{re.escape(why)}"):
        make_tracer_provider(None)


def test_an_interval_of_metrics_that_is_not_positive_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "-5")
    with pytest.raises(SettingsError, match=r"^OTEL_METRIC_EXPORT_INTERVAL: "):
        make_meter_provider(None)


@pytest.mark.parametrize(("variable", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
def test_tracing_can_be_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    assert make_tracer_provider(None) is None


def test_a_collector_that_does_not_respond_does_not_delay_the_exit() -> None:
    exporting, responded = threading.Event(), threading.Event()

    class Stuck(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:  # noqa: ARG002
            exporting.set()
            responded.wait(30)
            return SpanExportResult.SUCCESS

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Stuck()))
    provider.get_tracer("test").start_span("left over").end()
    shut_down(provider, timeout_s=0.1)
    assert exporting.wait(10)
    assert not responded.is_set()
    responded.set()


async def test_the_span_of_a_conversation_has_its_operation_and_number_of_outputs(tmp_path: Path) -> None:
    trace_file = tmp_path / "spans.jsonl"
    message = pb.Message(role=pb.ROLE_USER, content="Who are you?")
    request = pb.GenerateRequest(
        conversation=pb.Conversation(messages=[message]),
        sampling=pb.SamplingParameters(seed=1, num_sequences=2),
        decoding=pb.DecodingOptions(frequency_penalty=0.5, presence_penalty=-0.5),
        stopping=pb.StoppingCriteria(max_new_tokens=4, ignore_eos=True),
    )
    async with stub_of_server(trace_file) as (stub, _):
        await stub.Generate(request, metadata=FROM_CALLER)
    spans = spans_in(trace_file, TRACE_ID)
    attributes = spans[f"{RPC}Generate"]["attributes"]
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.choice.count"] == 2
    assert attributes["gen_ai.request.frequency_penalty"] == 0.5
    assert attributes["gen_ai.request.presence_penalty"] == -0.5
    assert attributes["gen_ai.response.finish_reasons"] == ["max_new_tokens"] * 2
    assert attributes["gen_ai.usage.output_tokens"] == spans["decode"]["attributes"]["gen_ai.usage.output_tokens"] == 8


async def test_an_id_that_is_too_long_is_no_attribute_of_a_span(tmp_path: Path) -> None:
    """A collector refuses what is larger than a few MiB, with all spans that are exported together."""
    trace_file = tmp_path / "trace.jsonl"
    async with stub_of_server(trace_file) as (stub, _):
        with pytest.raises(grpc.aio.AioRpcError, match="request_id"):
            await stub.Generate(generate_request(request_id="r" * 129), metadata=FROM_CALLER)
    assert not any("request_id" in name for name in spans_in(trace_file, TRACE_ID)[f"{RPC}Generate"]["attributes"])
