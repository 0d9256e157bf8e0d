"""The OpenTelemetry spans of calls."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mpt_grpc_client import AsyncClient, Client, DeadlineExceededError, NotFoundError

SERVICE = "mpt.v1.TextGenerationService"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The spans that end, as a program with OpenTelemetry's SDK records them."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # A process sets its provider once, so that of this test must not outlive it.
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


async def test_a_call_is_a_span_below_the_callers_and_above_the_servers(scripted, target, spans):
    with Client(target) as client, trace.get_tracer("caller").start_as_current_span("caller"):
        client.get_model_info()
        list(client.stream("Once"))
    async with AsyncClient(target) as client:
        await client.generate("Once")
        [_ async for _ in client.stream("Once")]
    ended = {span.name: span for span in spans.get_finished_spans()[:2]}
    names = [f"{SERVICE}/{name}" for name in ("GetModelInfo", "StreamGenerate")]
    assert list(ended) == names
    assert [span.name for span in spans.get_finished_spans()[3:]] == [f"{SERVICE}/Generate", names[1]]
    (caller,) = (span for span in spans.get_finished_spans() if span.name == "caller")
    for name, sent in zip(names, scripted.metadata, strict=False):
        span = ended[name]
        assert span.kind is trace.SpanKind.CLIENT
        assert span.parent.span_id == caller.context.span_id
        assert sent["traceparent"].split("-")[1:3] == [f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"]
        assert span.attributes == {
            "rpc.system.name": "grpc", "rpc.method": name, "rpc.response.status_code": "OK",
        }  # fmt: skip


def test_the_span_of_a_failed_call_has_the_error(service, target, spans):
    service.refuse(grpc.StatusCode.NOT_FOUND, "no such model", "UNKNOWN_MODEL")
    with Client(target) as client, pytest.raises(NotFoundError):
        list(client.stream("Once"))
    (span,) = spans.get_finished_spans()
    assert span.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert span.attributes["error.type"] == "UNKNOWN_MODEL"
    assert (span.status.status_code, span.status.description) == (trace.StatusCode.ERROR, "no such model")


@pytest.mark.usefixtures("endless")
def test_the_span_of_a_stream_ends_when_it_is_left_or_its_timeout_has_passed(service, target, spans):
    with Client(target) as client:
        with client.stream("Once") as stream:
            next(stream)
        service.hang()
        with pytest.raises(DeadlineExceededError):
            list(client.stream("Once", timeout=0.3))
    codes = [span.attributes["rpc.response.status_code"] for span in spans.get_finished_spans()]
    assert codes == ["CANCELLED", "DEADLINE_EXCEEDED"]


@pytest.mark.usefixtures("endless")
async def test_the_span_of_a_stream_ends_when_its_loop_is_left(target, spans):
    with Client(target) as client:
        for _ in client.stream("Once"):
            break
        assert [span.attributes["rpc.response.status_code"] for span in spans.get_finished_spans()] == ["CANCELLED"]
    async with AsyncClient(target) as client:
        async for _ in client.stream("Once"):
            break
        assert len(spans.get_finished_spans()) == 2


@pytest.mark.usefixtures("scripted")
def test_failed_attempts_are_events_of_the_span(target, spans):
    with Client(["127.0.0.1:1", target]) as client:
        client.get_model_info()
    (span,) = spans.get_finished_spans()
    assert span.attributes["rpc.response.status_code"] == "OK"
    assert [(event.name, event.attributes["server.address"]) for event in span.events] == [
        ("attempt failed", "127.0.0.1:1")
    ]
