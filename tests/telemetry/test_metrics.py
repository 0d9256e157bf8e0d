"""What Prometheus and a collector get of a server's work."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import access_tokens
import grpc
import opentelemetry.semconv._incubating.attributes.gen_ai_attributes as gen_ai
import opentelemetry.semconv._incubating.attributes.http_attributes as http
import opentelemetry.semconv._incubating.attributes.rpc_attributes as rpc
import opentelemetry.semconv._incubating.attributes.url_attributes as url
import opentelemetry.semconv._incubating.metrics.gen_ai_metrics as gen_ai_metrics
import opentelemetry.semconv._incubating.metrics.http_metrics as http_metrics
import opentelemetry.semconv._incubating.metrics.rpc_metrics as rpc_metrics
import opentelemetry.semconv.attributes.error_attributes as errors
import pytest
from conftest import demo_settings
from http_calls import fetch, read_response, send
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from otlp_collector import attributes, running_collector
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from mpt_grpc.caller import Caller
from mpt_grpc.reports import RequestReport
from mpt_grpc.request import GenerationRequest
from mpt_grpc.results import FinishReason, RequestStats
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.server.status import REASONS
from mpt_grpc.settings import HttpSettings, TelemetrySettings
from mpt_grpc.telemetry import names
from mpt_grpc.telemetry.metrics import MAX_CALLERS, OTHERS, Metrics
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

COUNTED_FROM_ZERO = {
    "mpt_requests_ended": len(FinishReason),
    "mpt_requests_failed": len(REASONS),
    "mpt_prompt_tokens": 1,
    "mpt_prompt_cached_tokens": 1,
    "mpt_speculation_draft_tokens": 1,
    "mpt_preempted_sequences": 1,
}
DOCS = Path(__file__).parents[2] / "docs"


@dataclass
class Service:
    server: RunningServer
    stub: Any

    async def page(self) -> dict[str, Metric]:
        """Returns the metrics on `/metrics`, by name."""
        status, content = await fetch(self.server, "GET", "/metrics")
        assert status == 200
        return {family.name: family for family in text_string_to_metric_families(content.decode())}

    async def value(self, name: str, **labels: str) -> float:
        """Returns the sum of the samples with this name and these labels."""
        samples = [sample for family in (await self.page()).values() for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[Service]:
    settings = replace(demo_settings(max_waiting_requests=0, max_running_requests=4), http=HttpSettings(port=0))
    async with running_server(settings) as server, grpc.aio.insecure_channel(server.target) as channel:
        yield Service(server, TextGenerationServiceStub(channel))


def request(max_new_tokens: int = 5, text: str = "Once upon a time", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text=text, stopping=pb.StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True), **fields
    )


async def test_a_request_is_measured_when_it_has_ended(service: Service) -> None:
    names = (
        ("gen_ai_server_request_duration_seconds_count", 1),
        ("gen_ai_server_time_to_first_token_seconds_count", 1),
        ("gen_ai_server_time_per_output_token_seconds_count", 1),
        ("mpt_request_queue_duration_seconds_count", 1),
        ("mpt_requests_ended_total", 1),
        ("mpt_caller_requests_total", 1),
        ("mpt_generated_tokens_total", 5),
        ("mpt_prompt_tokens_total", 4),
    )
    before = [await service.value(name) for name, _ in names]
    await service.stub.Generate(request())
    after = [await service.value(name) for name, _ in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [increase for _, increase in names]


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        (
            "gen_ai_server_request_duration_seconds",
            (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
        ),
        (
            "gen_ai_server_time_to_first_token_seconds",
            (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
        ),
        (
            "gen_ai_server_time_per_output_token_seconds",
            (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
        ),
        (
            "rpc_server_call_duration_seconds",
            (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
        ),
    ],
)
async def test_durations_have_the_buckets_of_the_conventions(
    service: Service, name: str, bounds: tuple[float, ...]
) -> None:
    await service.stub.Generate(request())
    samples = (await service.page())[name].samples
    assert {float(sample.labels["le"]) for sample in samples if sample.name.endswith("_bucket")} == {*bounds, math.inf}


async def test_tokens_of_cached_prompts_are_counted(service: Service) -> None:
    text = "A long prompt, which fills a block of the cache and more than that, for a hit: " * 2
    await service.stub.Generate(request(1, text))
    before = await service.value("mpt_prompt_cached_tokens_total")
    response = await service.stub.Generate(request(1, text))
    cached = response.summary.usage.num_cached_tokens
    assert await service.value("mpt_prompt_cached_tokens_total") - before == cached > 0


async def test_what_is_known_is_counted_from_zero() -> None:
    """For Prometheus, a counter whose first value is 1 has not increased."""
    settings = replace(demo_settings(), http=HttpSettings(port=0))
    async with running_server(settings) as server, grpc.aio.insecure_channel(server.target) as channel:
        page = await Service(server, TextGenerationServiceStub(channel)).page()
    counted = {name: [sample.value for sample in page[name].samples] for name in COUNTED_FROM_ZERO}
    assert counted == {name: [0.0] * number for name, number in COUNTED_FROM_ZERO.items()}


async def test_refused_requests_are_counted_by_the_reason(service: Service) -> None:
    refused = {
        "INVALID_REQUEST": request(5000),
        "UNKNOWN_MODEL": request(model="other"),
        "OVERLOADED": request(sampling=pb.SamplingParameters(seed=1, num_sequences=4)),
    }
    holding = service.stub.StreamGenerate(request(1500))
    await anext(aiter(holding))
    for reason, message in refused.items():
        before = await service.value("mpt_requests_failed_total", error_type=reason)
        with pytest.raises(grpc.aio.AioRpcError):
            await service.stub.Generate(message)
        assert await service.value("mpt_requests_failed_total", error_type=reason) == before + 1
    assert await service.value("mpt_requests_running") == 1
    assert await service.value("mpt_kv_cache_usage") > 0
    holding.cancel()


async def test_outputs_are_counted_by_the_finish_reason_that_their_caller_gets(service: Service) -> None:
    tool = pb.Tool(name="tell", parameters='{"type": "object", "additionalProperties": false}')
    conversation = pb.Conversation(
        messages=[pb.Message(role=pb.ROLE_USER, content="Who?")], tools=[tool], tool_choice=pb.TOOL_CHOICE_REQUIRED
    )
    two, greedy = pb.SamplingParameters(num_sequences=2), pb.SamplingParameters(temperature=0)
    stops = pb.StoppingCriteria(max_new_tokens=1, stop_strings=list("aeiou ,."), ignore_eos=True)
    cases = {
        "tool_calls": pb.GenerateRequest(conversation=conversation, stopping=pb.StoppingCriteria(max_new_tokens=60)),
        "max_new_tokens": request(2, sampling=two),
        "stop_string": pb.GenerateRequest(text="Once upon a time", sampling=greedy, stopping=stops),
    }
    for reason, message in cases.items():
        before = await service.value("mpt_requests_ended_total", mpt_finish_reason=reason)
        total = await service.value("mpt_requests_ended_total")
        response = await service.stub.Generate(message)
        assert {pb.FinishReason.Name(o.finish.reason) for o in response.outputs} == {f"FINISH_REASON_{reason.upper()}"}
        num_outputs = len(response.outputs)
        assert await service.value("mpt_requests_ended_total", mpt_finish_reason=reason) == before + num_outputs
        assert await service.value("mpt_requests_ended_total") == total + num_outputs


async def test_outputs_whose_caller_leaves_are_counted_as_cancelled(service: Service) -> None:
    before = await service.value("mpt_requests_ended_total", mpt_finish_reason="cancelled")
    call = service.stub.StreamGenerate(request(1500, sampling=pb.SamplingParameters(num_sequences=2)))
    await anext(aiter(call))
    call.cancel()
    while (ended := await service.value("mpt_requests_ended_total", mpt_finish_reason="cancelled")) == before:
        pass
    assert ended == before + 2


async def test_metrics_need_the_role_to_observe(tmp_path: Path) -> None:
    settings = demo_settings()
    server_settings = replace(settings.server, tokens_file=access_tokens.write(tmp_path / "tokens.toml"))
    async with running_server(
        replace(
            settings,
            server=server_settings,
            http=HttpSettings(port=0),
            telemetry=TelemetrySettings(metrics_port=0),
        )
    ) as server:
        own_port = replace_port(server)
        for target in (server, own_port):
            assert (await fetch(target, "GET", "/metrics"))[0] == 401
            for name, status in (("alice", 403), ("eve", 200)):
                bearer = f"Bearer {access_tokens.SECRETS[name]}"
                assert (await fetch(target, "GET", "/metrics", authorization=bearer))[0] == status
        assert (await fetch(own_port, "GET", "/health"))[0] == 404


def replace_port(server: RunningServer) -> Any:
    """Returns what `fetch` needs to call the metrics port instead of the HTTP port."""

    @dataclass
    class Target:
        http_port: int | None

    return Target(server.metrics_port)


async def test_a_website_cannot_read_metrics_by_another_name_for_this_machine(service: Service) -> None:
    status, _ = await fetch(service.server, "GET", "/metrics", host="evil.example")
    assert status == 403


async def test_the_page_is_negotiated_and_has_a_head(service: Service) -> None:
    for accept, kind, end in (
        ("*/*", "text/plain; version=0.0.4", b"\n"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version=1.0.0", b"\n# EOF\n"),
    ):
        _, headers, content = await read_response(*await send(service.server, "GET", "/metrics", accept=accept))
        assert headers["content-type"].startswith(kind)
        assert content.endswith(end)
        status, head, nothing = await read_response(*await send(service.server, "HEAD", "/metrics", accept=accept))
        assert (status, head["content-type"], nothing) == (200, headers["content-type"], b"")


async def test_names_that_callers_choose_make_no_series(service: Service) -> None:
    channel = grpc.aio.insecure_channel(service.server.target)

    async def send_names(suffix: str) -> None:
        await fetch(service.server, "GET", f"/{suffix}")
        await fetch(service.server, "GET", f"/v1/models/{suffix}")
        for method in (f"/mpt.v1.TextGenerationService/{suffix}", f"/{suffix}/Generate"):
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary(method)(b"")
        for fields in ({"model": suffix}, {"resume_fingerprint": suffix}):
            with pytest.raises(grpc.aio.AioRpcError):
                await service.stub.Generate(request(1, request_id=suffix, **fields))

    async def series() -> set[str]:
        page = await service.page()
        found = {f"{one.name}{sorted(one.labels.items())}" for family in page.values() for one in family.samples}
        return {one for one in found if not one.startswith("mpt_event_loop")}

    await send_names("a")
    before = await series()
    for number in range(20):
        await send_names(f"a{number}")
    assert await series() == before
    await channel.close()


async def test_metrics_are_exported_to_a_collector_with_exemplars(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_collector() as (collector, endpoint):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        async with running_server(demo_settings()) as server, grpc.aio.insecure_channel(server.target) as channel:
            stub: Any = TextGenerationServiceStub(channel)
            response = await stub.Generate(request())
        # The last values are exported at the end.
        await asyncio.to_thread(collector.wait_for, lambda found: names.REQUEST_DURATION in found.metrics)
    (point,) = collector.metrics[names.REQUEST_DURATION].histogram.data_points
    assert point.count == 1
    assert [exemplar.trace_id.hex() for exemplar in point.exemplars] == [response.summary.trace_id]
    assert attributes(point) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "mpt-grpc",
        "gen_ai.request.model": "demo",
    }


def test_callers_beyond_the_bound_are_counted_together() -> None:
    reader = InMemoryMetricReader()
    metrics = Metrics(MeterProvider([reader]).get_meter("test"), "demo")
    stats = RequestStats(1, 0, 0, 0, 1.0, 2.0, 3.0, 4.0, 2)
    for number in range(MAX_CALLERS + 5):
        sent = GenerationRequest("r", (1,), caller=Caller(f"caller-{number}"))
        metrics.record_request(RequestReport(sent, stats, (FinishReason.EOS_TOKEN,), None, None), "text_completion")
    data = reader.get_metrics_data()
    assert data is not None
    found = {metric.name: metric for r in data.resource_metrics for s in r.scope_metrics for metric in s.metrics}
    counts = {point.attributes["mpt.caller"]: point.value for point in found[names.CALLER_REQUESTS].data.data_points}
    assert len(counts) == MAX_CALLERS + 1
    assert counts[OTHERS] == 5


def test_names_are_those_of_the_conventions() -> None:
    known = {
        value
        for module in (gen_ai, http, url, rpc, errors, gen_ai_metrics, http_metrics, rpc_metrics)
        for value in vars(module).values()
        if isinstance(value, str)
    }
    ours = {value for key, value in vars(names).items() if key.isupper()}
    conventional = {name for name in ours if name.startswith(("rpc.", "http.", "url.", "gen_ai.", "error."))}
    assert len(conventional) > 20
    assert conventional - known == set()


async def test_the_page_of_the_documentation_lists_every_metric(service: Service) -> None:
    await service.stub.Generate(request())
    await fetch(service.server, "GET", "/v1/models")
    while "mpt_event_loop_lag_seconds" not in await service.page():
        pass  # it is measured four times a second
    page = (DOCS / "telemetry.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `((?:mpt|gen_ai|rpc|http)_\w+)`", page, re.MULTILINE))
    exposed = {
        sample.name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
        for family in (await service.page()).values()
        for sample in family.samples
    }
    ours = {
        name
        for name in exposed
        if name.startswith(("mpt_", "gen_ai_", "rpc_", "http_")) and not name.endswith("_created")
    }
    assert ours == documented


async def test_the_page_of_the_documentation_lists_every_label(service: Service) -> None:
    await service.stub.Generate(request())
    await fetch(service.server, "GET", "/v1/models")
    page = (DOCS / "telemetry.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `((?:mpt|gen_ai|rpc|http)_\w+)` \| (.*) \|.*\|$", page, re.MULTILINE))
    documented = {
        name: set(re.findall(r"`((?:mpt|gen_ai|rpc|http|url|error)_\w+)`", row)) - {"error_type"}
        for name, row in rows.items()
    }
    exposed: dict[str, set[str]] = {name: set() for name in documented}
    for family in (await service.page()).values():
        for sample in family.samples:
            for name in {family.name, f"{family.name}_total"} & documented.keys():
                exposed[name] |= sample.labels.keys() - {"le", "error_type"}
    assert exposed == documented
