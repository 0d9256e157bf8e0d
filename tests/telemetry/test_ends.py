"""However a generation ends, its span, the metrics and its line in the log say the same of it, once."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import access_tokens
import grpc
import pytest
from conftest import demo_settings
from google.protobuf.duration_pb2 import Duration
from http_calls import fetch
from otlp_collector import Collector, attributes, running_collector
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from mpt_grpc.engine import parts
from mpt_grpc.model.runner import Runner, StepOutput
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings
from mpt_grpc.step import StepPlan
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

SERVICE = "mpt.v1.TextGenerationService"
PHASES = {"queue", "prefill", "decode"}
FAILURES_OF_SERVERS = {"DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE"}
NOT_UNDERSTOOD = {
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "QUOTA_EXCEEDED",
    "UNKNOWN_MODEL",
    "FINGERPRINT_MISMATCH",
}
"""The reasons of refusals whose durations are not those of generations."""
POISON, EOS = 666, 0
"""A prompt token with which steps fail, and the token that ends texts."""
COUNTED = (
    "mpt_requests_ended_total",
    "mpt_requests_failed_total",
    "mpt_caller_requests_total",
    "mpt_caller_tokens_total",
    "rpc_server_call_duration_seconds_count",
    "gen_ai_server_request_duration_seconds_count",
)
_trace_ids = (f"{number:032x}" for number in itertools.count(1))


class PoisonableRunner(Runner):
    """Fails with a poisonous prompt."""

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
        if any(POISON in step.token_ids and step.num_known > 1 for step in plan.sequences):
            raise RuntimeError("poison")
        return super().run(plan, chosen)


class Lines(logging.Handler):
    """The lines of calls in the log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.fields: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.fields.append(record.__dict__["fields"])


@dataclass
class Watched:
    """A server, and all that it says of its work."""

    server: RunningServer
    stub: Any
    collector: Collector
    lines: list[dict[str, Any]]

    @property
    def queued(self) -> list[Any]:
        """The first phases of all requests."""
        return [span for span in self.collector.spans if span.name == "queue"]

    async def counts(self) -> Counter[tuple[str, tuple[tuple[str, str], ...]]]:
        """Returns the values of the counters, by their names and labels."""
        observer = f"Bearer {access_tokens.SECRETS['eve']}"
        _, page = await fetch(self.server, "GET", "/metrics", authorization=observer)
        return Counter(
            {
                (sample.name, tuple(sorted(pair for pair in sample.labels.items() if pair[1]))): sample.value
                for family in text_string_to_metric_families(page.decode())
                for sample in family.samples
                if sample.name in COUNTED
            }
        )


@asynccontextmanager
async def watching(folder: Path) -> AsyncIterator[Watched]:
    """A server with access tokens, quotas, a guard and a queue."""
    lines, settings, log = Lines(), demo_settings(200, max_running_requests=4), logging.getLogger("mpt_grpc.access")
    (folder / "words").write_text("dragon\n")
    access_tokens.write(folder / "tokens")
    with (folder / "tokens").open("a") as file:
        file.write("[quotas.bob]\nmax_requests = 1\n")
    settings = replace(
        settings,
        server=replace(settings.server, tokens_file=folder / "tokens", grace_s=0.0),
        http=HttpSettings(port=0),
        guards=(f"words={folder / 'words'}",),
        scheduler=replace(settings.scheduler, max_waiting_requests=2),
    )
    with running_collector() as (collector, endpoint), pytest.MonkeyPatch.context() as patched:
        patched.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        patched.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        patched.setattr(parts, "Runner", PoisonableRunner)
        log.addHandler(lines)
        level = log.level
        log.setLevel(logging.INFO)
        try:
            async with running_server(settings) as server, grpc.aio.insecure_channel(server.target) as channel:
                yield Watched(server, TextGenerationServiceStub(channel), collector, lines.fields)
        finally:
            log.removeHandler(lines)
            log.setLevel(level)


@pytest.fixture(scope="module")
async def watched(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watched]:
    async with watching(tmp_path_factory.mktemp("ends")) as running:
        yield running


def request(text: str = "Once upon a time", *, max_new_tokens: int = 4, **fields: Any) -> pb.GenerateRequest:
    stopping = pb.StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos="decoding" not in fields)
    stopping.MergeFrom(fields.pop("stopping", pb.StoppingCriteria()))
    return pb.GenerateRequest(text=text, stopping=stopping, **fields)


def several(number: int) -> pb.SamplingParameters:
    return pb.SamplingParameters(num_sequences=number, seed=1)


LONG = request(max_new_tokens=1900, sampling=several(2))
TOOL = pb.Tool(name="tell", parameters='{"type": "object", "additionalProperties": false}')
CONVERSATION = pb.Conversation(
    messages=[pb.Message(role=pb.ROLE_USER, content="Who?")], tools=[TOOL], tool_choice=pb.TOOL_CHOICE_REQUIRED
)


@dataclass
class End:
    """A request, how its caller ends it, and what is to be said of it."""

    request: pb.GenerateRequest
    finishes: tuple[str, ...] = ()
    code: str = "OK"
    reason: str | None = None
    caller: str = "alice"
    how: str = "read"
    """'read' to the end, 'leave' in mid-stream, 'cancel' by its ID, or wait until the 'deadline'."""
    others: tuple[pb.GenerateRequest, ...] = ()
    """Streams of the same caller that are in progress meanwhile."""
    is_accepted: bool = True


def refused(request: pb.GenerateRequest, code: str, reason: str, **fields: Any) -> End:
    return End(request, (), code, reason, is_accepted=False, **fields)


def stopping(**fields: Any) -> pb.StoppingCriteria:
    return pb.StoppingCriteria(**fields)


ENDS = {
    "all tokens": End(request(), ("max_new_tokens",)),
    "all tokens of several outputs": End(request(sampling=several(3)), ("max_new_tokens",) * 3),
    "end of text": End(request(decoding=pb.DecodingOptions(regex="yes")), ("eos_token",)),
    "stop string": End(request(max_new_tokens=200, stopping=stopping(stop_strings=list("aeiou"))), ("stop_string",)),
    "stop token": End(
        request(
            max_new_tokens=200,
            stopping=stopping(stop_token_ids=[5]),
            decoding=pb.DecodingOptions(allowed_token_ids=[5]),
        ),
        ("stop_token",),
    ),
    "context": End(
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 2000), stopping=stopping(ignore_eos=True)),
        ("context_length",),
    ),
    "time limit": End(
        request(max_new_tokens=1900, stopping=stopping(time_limit=Duration(nanos=200_000_000))), ("time_limit",)
    ),
    "repetition": End(
        request(
            max_new_tokens=200,
            decoding=pb.DecodingOptions(allowed_token_ids=[5]),
            stopping=stopping(ignore_eos=True, repetition_guard=pb.RepetitionGuard(min_repeats=3, max_cycle_tokens=4)),
        ),
        ("repetition",),
    ),
    "guard of outputs": End(
        request(max_new_tokens=60, decoding=pb.DecodingOptions(regex="The dragon ran and ran")), ("content_filter",)
    ),
    "tool calls": End(
        pb.GenerateRequest(conversation=CONVERSATION, stopping=stopping(max_new_tokens=60)), ("tool_calls",)
    ),
    "caller leaves": End(LONG, ("cancelled",) * 2, "CANCELLED", how="leave"),
    "cancelled by its ID": End(LONG, ("cancelled",) * 2, how="cancel"),
    "deadline": End(LONG, ("cancelled",) * 2, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", how="deadline"),
    "resumed": End(request(resume_token_ids=[5, 6], sampling=pb.SamplingParameters(seed=1)), ("max_new_tokens",)),
    "anonymous": refused(request(), "UNAUTHENTICATED", "UNAUTHENTICATED", caller=""),
    "without the role": refused(request(), "PERMISSION_DENIED", "PERMISSION_DENIED", caller="eve"),
    "invalid": refused(request(sampling=pb.SamplingParameters(temperature=-1)), "INVALID_ARGUMENT", "INVALID_REQUEST"),
    "invalid after preparation": refused(request("x " * 5000), "INVALID_ARGUMENT", "INVALID_REQUEST"),
    "guard of prompts": refused(request("A dragon came"), "INVALID_ARGUMENT", "PROMPT_REFUSED"),
    "unknown model": refused(request(model="other"), "NOT_FOUND", "UNKNOWN_MODEL"),
    "duplicate": refused(
        request(request_id="same"),
        "ALREADY_EXISTS",
        "DUPLICATE_REQUEST_ID",
        others=(request(max_new_tokens=1900, request_id="same"),),
    ),
    "another fingerprint": refused(request(resume_fingerprint="x"), "FAILED_PRECONDITION", "FINGERPRINT_MISMATCH"),
    "quota": refused(request(), "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED", caller="bob", others=(LONG,)),
    "overloaded": refused(
        request(), "RESOURCE_EXHAUSTED", "OVERLOADED", others=(request(max_new_tokens=1900, sampling=several(6)),)
    ),
    "fault": End(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, POISON])), (), "INTERNAL", "ENGINE_FAULT"),
}
"""By what ends them."""


@dataclass
class Said:
    """What was said of one call."""

    span: Any
    phases: dict[str, Any]
    line: dict[str, Any]
    increases: Counter[tuple[str, tuple[tuple[str, str], ...]]]
    """Of the counters, by their names and labels."""

    def counted(self, name: str, label: str) -> dict[str, float]:
        """Returns the increases of a counter by a label."""
        return {
            dict(labels)[label]: value
            for (counter, labels), value in self.increases.items()
            if counter == name and value
        }


async def drive(watched: Watched, end: End, method: str) -> Said:
    """Sends the request, ends it and returns what was said of it."""
    trace_id = next(_trace_ids)
    own = [("authorization", f"Bearer {access_tokens.SECRETS[end.caller]}")] if end.caller else []
    others = [watched.stub.StreamGenerate(other, metadata=[*own, traced(next(_trace_ids))]) for other in end.others]
    for other in others:
        await anext(aiter(other))
    before, num_lines = await watched.counts(), len(watched.lines)
    message = pb.GenerateRequest()
    message.CopyFrom(end.request)
    message.request_id = message.request_id or trace_id
    message.sampling.seed = 1
    call = getattr(watched.stub, method)(
        message, metadata=[*own, traced(trace_id)], timeout=1.0 if end.how == "deadline" else None
    )
    if end.how == "leave" or end.how == "cancel":
        if method == "StreamGenerate":
            await anext(aiter(call))
        else:
            while not [
                r for r in (await state(watched)).in_flight if r.request_id == message.request_id and r.sequences
            ]:
                pass
        if end.how == "leave":
            call.cancel()
        else:
            await watched.stub.Cancel(pb.CancelRequest(request_ids=[message.request_id]), metadata=own)
    with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        if method == "StreamGenerate":
            async for _ in call:
                pass
        else:
            await call
    name = f"{SERVICE}/{method}"
    wanted = {name} | ({"queue"} if end.is_accepted else set())
    await asyncio.to_thread(watched.collector.wait_for, lambda found: wanted <= found.trace(trace_id).keys())
    spans = [span for span in watched.collector.spans if span.trace_id.hex() == trace_id]
    by_name = {span.name: span for span in spans}
    assert len(by_name) == len(spans), "a span is recorded twice"
    (line,) = [one for one in watched.lines[num_lines:] if one["method"] == method and one["trace_id"] == trace_id]
    increases = await watched.counts()
    increases.subtract(before)
    num_queued = len(watched.queued)
    for other in others:
        other.cancel()
    # The phases of a request are recorded with its metrics.
    await asyncio.to_thread(watched.collector.wait_for, lambda _: len(watched.queued) == num_queued + len(others))
    return Said(by_name.pop(name), by_name, line, increases)


def traced(trace_id: str) -> tuple[str, str]:
    return "traceparent", f"00-{trace_id}-b7ad6b7169203331-01"


async def state(watched: Watched) -> Any:
    return await asyncio.wrap_future(watched.server.engine.state())


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
@pytest.mark.parametrize("name", ENDS)
async def test_the_span_the_metrics_and_the_line_say_the_same(watched: Watched, name: str, method: str) -> None:
    end = ENDS[name]
    said = await drive(watched, end, method)
    span, line = attributes(said.span), said.line
    assert (span["rpc.response.status_code"], line["status"]) == (end.code, end.code)
    assert (span.get("error.type"), line.get("reason")) == (end.reason, end.reason)
    is_failure = said.span.status.code == said.span.status.STATUS_CODE_ERROR
    assert is_failure is (end.code in FAILURES_OF_SERVERS)
    assert said.span.status.message == (line["error"] if is_failure else "")
    assert (span.get("mpt.caller", ""), line.get("caller", "")) == (end.caller, end.caller)
    assert (finish_reasons(said.span), line.get("finish", "")) == (end.finishes, ",".join(end.finishes))

    assert said.counted("mpt_requests_ended_total", "mpt_finish_reason") == Counter(end.finishes)
    assert said.counted("mpt_requests_failed_total", "error_type") == ({end.reason: 1} if end.reason else {})
    durations = said.counted("gen_ai_server_request_duration_seconds_count", "gen_ai_operation_name")
    assert sum(durations.values()) == (end.reason not in NOT_UNDERSTOOD)
    assert said.counted("mpt_caller_requests_total", "mpt_caller") == ({end.caller: 1} if end.is_accepted else {})
    calls = {labels: n for (counter, labels), n in said.increases.items() if n and counter.startswith("rpc_")}
    ((labels, number),) = [(dict(key), n) for key, n in calls.items() if f"{SERVICE}/{method}" in dict(key).values()]
    assert (labels["rpc_response_status_code"], labels.get("error_type") or None, number) == (end.code, end.reason, 1)
    if end.code == "OK":
        assert span["gen_ai.usage.output_tokens"] == line["output_tokens"] > 0

    assert bool(said.phases) is end.is_accepted
    assert said.phases.keys() <= PHASES
    for phase in said.phases.values():
        assert phase.parent_span_id == said.span.span_id
        assert said.span.start_time_unix_nano <= phase.start_time_unix_nano <= phase.end_time_unix_nano
        assert phase.end_time_unix_nano <= said.span.end_time_unix_nano
    failed = [attributes(phase)["error.type"] for phase in said.phases.values() if "error.type" in attributes(phase)]
    assert failed == (["ENGINE_FAULT"] if name == "fault" else [])


def finish_reasons(span: Any) -> tuple[str, ...]:
    found = attributes(span).get("gen_ai.response.finish_reasons")
    return () if found is None else tuple(value.string_value for value in found.values)


async def test_streams_that_a_drain_ends_say_so(tmp_path: Path) -> None:
    async with watching(tmp_path) as watched:
        trace_id = next(_trace_ids)
        own = ("authorization", f"Bearer {access_tokens.SECRETS['alice']}")
        stream = watched.stub.StreamGenerate(request(max_new_tokens=1900), metadata=[own, traced(trace_id)])
        await anext(aiter(stream))
        await watched.server.drain()
        await asyncio.to_thread(watched.server.engine.close)
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
            async for _ in stream:
                pass
        collector, lines = watched.collector, watched.lines
    spans = collector.trace(trace_id)
    (line,) = [line for line in lines if line["method"] == "StreamGenerate"]
    call = attributes(spans[f"{SERVICE}/StreamGenerate"])
    assert {line["reason"], call["error.type"], attributes(spans["decode"])["error.type"]} == {"DRAINING"}
    assert (line["status"], call["rpc.response.status_code"]) == ("UNAVAILABLE", "UNAVAILABLE")
