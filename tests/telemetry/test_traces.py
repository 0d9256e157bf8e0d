"""Traces as a collector receives them: from the caller's span to the steps of the engine."""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import demo_settings
from http_calls import send
from otlp_collector import Collector, attributes, running_collector

from mpt_grpc.schedule.step_times import StepTimes
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings, TelemetrySettings
from mpt_grpc.telemetry.exporting import make_tracer_provider
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

CALLER_ID = "b7ad6b7169203331"
RPC = "mpt.v1.TextGenerationService/"
PHASES = {"queue", "prefill", "decode"}
TEXT = "The cat sat on the mat. The dog sat on the mat. The cat sat on the mat. The dog sat on"
_trace_ids = (f"{number:032x}" for number in itertools.count(1))


@dataclass
class Traced:
    """A server, a stub of it and what its collector received."""

    server: RunningServer
    stub: Any
    collector: Collector

    async def trace(self, trace_id: str, is_complete: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Returns the spans of a trace by name, when the collector has those that make it complete."""
        await asyncio.to_thread(self.collector.wait_for, lambda found: is_complete(found.trace(trace_id)))
        return self.collector.trace(trace_id)


@pytest.fixture(scope="module")
async def traced() -> AsyncIterator[Traced]:
    """A server with a small cache and short steps, which drafts."""
    with running_collector() as (collector, endpoint), pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        # All drafts pay where a step takes the same time whatever it computes.
        environment.setattr(StepTimes, "seconds", lambda *_: 1.0)
        settings = demo_settings(14, max_running_requests=4, max_step_tokens=16, speculate="ngram")
        telemetry = TelemetrySettings(trace_steps=1)
        async with running_server(replace(settings, http=HttpSettings(port=0), telemetry=telemetry)) as server:
            async with grpc.aio.insecure_channel(server.target) as channel:
                yield Traced(server, TextGenerationServiceStub(channel), collector)


def from_caller(trace_id: str, flags: str = "01") -> tuple[tuple[str, str], ...]:
    return (("traceparent", f"00-{trace_id}-{CALLER_ID}-{flags}"),)


def request(max_new_tokens: int, text: str = TEXT, **fields: Any) -> pb.GenerateRequest:
    stopping = pb.StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True)
    return pb.GenerateRequest(text=text, stopping=stopping, sampling=pb.SamplingParameters(temperature=0), **fields)


def long_request() -> pb.GenerateRequest:
    """Returns a request for outputs that take seconds, since they preempt each other."""
    stopping = pb.StoppingCriteria(max_new_tokens=200, ignore_eos=True)
    return pb.GenerateRequest(text="Once", stopping=stopping, sampling=pb.SamplingParameters(seed=1, num_sequences=4))


async def is_decoding(traced: Traced) -> bool:
    state = await asyncio.wrap_future(traced.server.engine.state())
    return any(one.num_output_tokens for request in state.in_flight for one in request.sequences)


def has(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda spans: set(names) <= spans.keys()


def end_in_order(spans: dict[str, Any], *parents: str) -> bool:
    """Whether each span ends within the one before it, and the phases of the engine within the last."""
    chain = [*parents, "decode"]
    pairs = [*itertools.pairwise(chain), *((parents[-1], phase) for phase in PHASES & spans.keys())]
    return all(
        spans[child].parent_span_id == spans[parent].span_id
        and spans[parent].start_time_unix_nano <= spans[child].start_time_unix_nano
        and spans[child].end_time_unix_nano <= spans[parent].end_time_unix_nano
        for parent, child in pairs
    )


def events(span: Any) -> list[str]:
    return [event.name for event in span.events]


async def test_a_prompt_is_shown_in_its_chunks_and_drafts_in_their_steps(traced: Traced) -> None:
    trace_id = next(_trace_ids)
    await traced.stub.Generate(request(48), metadata=from_caller(trace_id))
    spans = await traced.trace(trace_id, has(f"{RPC}Generate"))
    assert end_in_order(spans, f"{RPC}Generate")
    chunks = [attributes(event)["mpt.tokens"] for event in spans["prefill"].events if event.name == "chunk"]
    assert len(chunks) > 1
    assert sum(chunks) == attributes(spans["prefill"])["gen_ai.usage.input_tokens"]
    decode = spans["decode"]
    assert events(decode)[:2] == ["first token", "speculation"]
    checked = [attributes(event) for span in spans.values() for event in span.events if event.name == "speculation"]
    for name in ("mpt.draft_tokens", "mpt.accepted_tokens"):
        assert attributes(decode)[name] == sum(one[name] for one in checked) > 0


async def test_a_preempted_request_shows_its_preemption_and_its_resumption(traced: Traced) -> None:
    ids = [next(_trace_ids) for _ in range(2)]
    calls = [traced.stub.Generate(request(100, f"{n} {TEXT}"), metadata=from_caller(i)) for n, i in enumerate(ids)]
    for call in calls:
        await call
    traces = [await traced.trace(trace_id, has(f"{RPC}Generate")) for trace_id in ids]
    preempted = [spans["decode"] for spans in traces if attributes(spans["decode"])["mpt.preemptions"]]
    assert preempted
    for decode in preempted:
        shown = [name for name in events(decode) if name in ("preemption", "resumption")]
        assert shown[:2] == ["preemption", "resumption"]


async def test_steps_are_linked_to_their_requests(traced: Traced) -> None:
    trace_id = next(_trace_ids)
    await traced.stub.Generate(request(5, "Once upon a time, in a wood"), metadata=from_caller(trace_id))
    spans = await traced.trace(trace_id, has(f"{RPC}Generate"))
    call = spans[f"{RPC}Generate"]

    def of_request() -> list[Any]:
        spans = [span for span in traced.collector.spans if span.name == "step"]
        return [span for span in spans if any(link.span_id == call.span_id for link in span.links)]

    def kinds(_: Collector) -> set[str]:
        return {attributes(step)["mpt.step.kind"] for step in of_request()}

    await asyncio.to_thread(traced.collector.wait_for, lambda found: kinds(found) == {"prefill", "decode"})
    assert {link.trace_id.hex() for step in of_request() for link in step.links} == {trace_id}


async def test_a_passed_deadline_is_an_error_and_the_phases_end_with_the_call(traced: Traced) -> None:
    trace_id = next(_trace_ids)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await traced.stub.Generate(long_request(), metadata=from_caller(trace_id), timeout=0.3)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    spans = await traced.trace(trace_id, has(f"{RPC}Generate", "queue"))
    rpc = spans[f"{RPC}Generate"]
    assert rpc.status.code == rpc.status.STATUS_CODE_ERROR
    assert attributes(rpc)["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert attributes(rpc)["error.type"] == "DEADLINE_EXCEEDED"
    for phase in PHASES & spans.keys():
        assert spans[phase].end_time_unix_nano <= rpc.end_time_unix_nano


async def test_a_cancelled_call_ends_after_its_phases(traced: Traced) -> None:
    trace_id = next(_trace_ids)
    call = traced.stub.StreamGenerate(long_request(), metadata=from_caller(trace_id))
    await anext(aiter(call))
    call.cancel()
    spans = await traced.trace(trace_id, has(f"{RPC}StreamGenerate", *PHASES))
    assert end_in_order(spans, f"{RPC}StreamGenerate")
    assert attributes(spans[f"{RPC}StreamGenerate"])["rpc.response.status_code"] == "CANCELLED"
    reasons = attributes(spans["decode"])["gen_ai.response.finish_reasons"].values
    assert {reason.string_value for reason in reasons} == {"cancelled"}


async def test_an_http_request_is_traced_through_the_gateway(traced: Traced) -> None:
    trace_id = next(_trace_ids)
    ((_, parent),) = from_caller(trace_id)
    body = {"prompt": "Once", "max_tokens": 3, "ignore_eos": True, "stream": True}
    reader, writer = await send(traced.server, "POST", "/v1/completions", body, traceparent=parent)
    await reader.read()
    writer.close()
    spans = await traced.trace(trace_id, has("POST /v1/completions"))
    assert end_in_order(spans, "POST /v1/completions", f"{RPC}StreamGenerate")
    assert spans["POST /v1/completions"].parent_span_id.hex() == CALLER_ID


def parent(trace_id: str) -> tuple[str, str]:
    return "traceparent", f"00-{trace_id}-{CALLER_ID}-01"


@pytest.mark.parametrize("protocol", ["gRPC", "HTTP"])
@pytest.mark.parametrize(
    ("headers", "state"),
    [
        ([("tracestate", "a=1"), ("tracestate", "b=2,c=3")], "a=1,b=2,c=3"),
        ([("tracestate", "!?,=,a==")], ""),
        ([("tracestate", f"a={'b' * 600}")], ""),
        ([parent("f" * 32)], None),
    ],
)
async def test_the_headers_of_a_caller_are_read_as_the_standard_says(
    traced: Traced, protocol: str, headers: list[tuple[str, str]], state: str | None
) -> None:
    """state: that of the spans, or None if the headers are not valid and a trace begins."""
    if protocol == "gRPC" and state is None:
        pytest.skip("gRPC itself keeps the last traceparent only")
    trace_id, request_id = next(_trace_ids), f"headers-{next(_trace_ids)}"
    metadata = [parent(trace_id), *headers]
    if protocol == "gRPC":
        await traced.stub.Generate(request(1, request_id=request_id), metadata=metadata)
        name = f"{RPC}Generate"
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", traced.server.http_port)
        body = json.dumps({"prompt": "Once", "max_tokens": 1})
        own = [("host", "localhost"), ("x-request-id", request_id), ("connection", "close")]
        fields = [f"{name}: {value}" for name, value in [*own, ("content-length", len(body)), *metadata]]
        writer.write("\r\n".join(["POST /v1/completions HTTP/1.1", *fields, "", body]).encode())
        await reader.read()
        writer.close()
        name = "POST /v1/completions"

    def spans(collector: Collector) -> list[Any]:
        mine = [span for span in collector.spans if attributes(span).get("mpt.request_id", "").startswith(request_id)]
        return [span for span in mine if span.name == name]

    await asyncio.to_thread(traced.collector.wait_for, spans)
    (span,) = spans(traced.collector)
    if state is None:
        assert (span.parent_span_id, span.trace_id.hex() == trace_id, span.trace_state) == (b"", False, "")
    else:
        assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (trace_id, CALLER_ID, state)


async def test_the_span_of_an_http_request_whose_caller_leaves_ends_last(traced: Traced) -> None:
    trace_id = next(_trace_ids)
    ((_, parent),) = from_caller(trace_id)
    body = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "n": 4, "seed": 1}
    _, writer = await send(traced.server, "POST", "/v1/completions", body, traceparent=parent)
    while not await is_decoding(traced):
        pass
    writer.close()
    spans = await traced.trace(trace_id, has("POST /v1/completions", f"{RPC}Generate", *PHASES))
    assert end_in_order(spans, "POST /v1/completions", f"{RPC}Generate")
    assert attributes(spans["POST /v1/completions"])["http.response.status_code"] == 499


async def test_a_call_that_its_caller_does_not_sample_is_not_traced(traced: Traced) -> None:
    trace_id, later_id = next(_trace_ids), next(_trace_ids)
    response = await traced.stub.Generate(request(1), metadata=from_caller(trace_id, flags="00"))
    assert response.summary.trace_id == ""
    await traced.stub.Generate(request(1), metadata=from_caller(later_id))
    await traced.trace(later_id, has(f"{RPC}Generate"))
    assert traced.collector.trace(trace_id) == {}


async def test_the_sampler_of_the_environment_decides_about_calls_without_a_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running_collector() as (collector, endpoint):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
        trace_id = next(_trace_ids)
        async with running_server(demo_settings()) as server, grpc.aio.insecure_channel(server.target) as channel:
            stub: Any = TextGenerationServiceStub(channel)
            assert (await stub.Generate(request(1))).summary.trace_id == ""
            await stub.Generate(request(1), metadata=from_caller(trace_id))
        assert {span.trace_id.hex() for span in collector.spans} == {trace_id}


async def test_spans_for_a_collector_that_is_down_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    settings = replace(demo_settings(), telemetry=TelemetrySettings(metrics_port=0))
    async with running_server(settings) as server, grpc.aio.insecure_channel(server.target) as channel:
        stub: Any = TextGenerationServiceStub(channel)
        for _ in range(10):
            await stub.Generate(request(1))
        reader, writer = await asyncio.open_connection("127.0.0.1", server.metrics_port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        page = (await reader.read()).decode()
        writer.close()
    (dropped,) = [line for line in page.splitlines() if "span_processed_total{" in line and "queue_full" in line]
    assert float(dropped.split()[-1]) >= 30 - 8 - 4


async def test_a_full_disk_under_the_trace_file_costs_only_spans(caplog: pytest.LogCaptureFixture) -> None:
    settings = replace(demo_settings(), telemetry=TelemetrySettings(trace_file=Path("/dev/full")))
    async with running_server(settings) as server, grpc.aio.insecure_channel(server.target) as channel:
        stub: Any = TextGenerationServiceStub(channel)
        for _ in range(3):
            assert (await stub.Generate(request(1))).summary.trace_id
    failures = [record for record in caplog.records if record.name.startswith("opentelemetry")]
    assert [failure.getMessage() for failure in failures] == ["Exception while exporting Span."]


def test_a_line_that_a_full_disk_has_cut_off_is_ended_before_the_next_span(tmp_path: Path) -> None:
    file = tmp_path / "spans"
    provider = make_tracer_provider(file)
    assert provider is not None
    tracer, free = provider.get_tracer("test"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, free[1]))
    try:
        tracer.start_span("lost").end()
        provider.force_flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    tracer.start_span("kept").end()
    provider.shutdown()
    with file.open("a") as crashed:
        crashed.write("{")
    again = make_tracer_provider(file)
    assert again is not None
    again.get_tracer("test").start_span("after a crash").end()
    again.shutdown()
    lines = file.read_text().split("\n")
    assert [len(lines[0]), lines[2], lines[4]] == [100, "{", ""]
    assert [json.loads(lines[index])["name"] for index in (1, 3)] == ["kept", "after a crash"]
