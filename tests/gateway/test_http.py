"""The gateway's HTTP behaviour below what SDKs expose: disconnects, headers, methods and idle streams."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SteppedRunner, demo_settings
from http_calls import fetch, read_response, send
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from mpt_grpc import __version__
from mpt_grpc.gateway import events
from mpt_grpc.gateway.serve import running_gateway
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings, ServerSettings, TelemetrySettings
from mpt_grpc.telemetry.metrics import HttpMetrics

ENDLESS = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture
async def gateway() -> AsyncIterator[RunningServer]:
    settings = replace(demo_settings(), http=HttpSettings(port=0, strict_model_names=True))
    async with running_server(settings) as server:
        yield server


@pytest.fixture
async def stepped_server(stepped: list[SteppedRunner]) -> AsyncIterator[RunningServer]:
    """A server whose steps the test allows one by one, with a grace period longer than any test."""
    settings = replace(demo_settings(), http=HttpSettings(port=0), server=ServerSettings(grpc_port=0, grace_s=600))
    async with running_server(settings) as server:
        yield server
        stepped[0].run_free()


@pytest.mark.parametrize(("stream", "has_started"), [(False, False), (True, False), (True, True)])
async def test_a_disconnect_cancels_the_call(
    stepped: list[SteppedRunner], stepped_server: RunningServer, stream: bool, has_started: bool
) -> None:
    reader, writer = await send(stepped_server, "POST", "/v1/completions", {**ENDLESS, "stream": stream})
    await asyncio.to_thread(stepped[0].wait_for_step)
    if has_started:
        for _ in range(4):
            stepped[0].allow()
        await reader.readuntil(b"data: ")
    writer.close()
    async with asyncio.timeout(60):
        await stepped_server.drain()  # returns once no call is in progress


async def test_the_tokenization_of_messages_has_the_id_of_its_request_and_is_cancelled_with_it(
    stepped: list[SteppedRunner], stepped_server: RunningServer
) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    _, writer = await send(stepped_server, "POST", "/tokenize", body, x_request_id="order-17")
    await asyncio.to_thread(stepped[0].wait_for_step)
    assert stepped[0].plans[-1].sequences[0].request_id.startswith("order-17")
    writer.close()
    async with asyncio.timeout(60):
        await stepped_server.drain()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_idle_stream_is_kept_alive_with_empty_chunks(
    stepped: list[SteppedRunner], stepped_server: RunningServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(events, "KEEPALIVE_S", 0.05)
    body = {"max_tokens": 6, "ignore_eos": True, "seed": 1}
    body |= {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Once"}
    reader, writer = await send(stepped_server, "POST", path, {**body, "stream": True})
    for _ in range(3):
        stepped[0].allow()
    chunks: list[Any] = []
    async for line in reader:
        if line.startswith(b"data: {"):
            chunks.append(json.loads(line[6:]))
            if chunks[-2:] == chunks[-1:] * 2:  # the same chunk twice: an empty one
                stepped[0].run_free()
    writer.close()
    empty = next(chunk for chunk, following in itertools.pairwise(chunks) if chunk == following)
    assert {chunk["id"] for chunk in chunks} == {empty["id"]}
    assert empty["choices"][0]["finish_reason"] is None
    streamed = "".join(_text(chunk["choices"][0]) for chunk in chunks)
    response = (await fetch(stepped_server, "POST", path, body))[1]
    assert _text(empty["choices"][0]) == ""
    assert streamed == _text(response["choices"][0])


def _text(choice: Any) -> str:
    return (
        choice.get("text") or choice.get("delta", {}).get("content") or choice.get("message", {}).get("content") or ""
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
async def test_calls_of_the_gateway_continue_the_callers_trace(tmp_path: Path, stream: bool, prompt: Any) -> None:
    trace_file, trace_id = tmp_path / "spans.jsonl", "0af7651916cd43dd8448eb211c80319c"
    telemetry = TelemetrySettings(trace_file=trace_file)
    async with running_server(replace(demo_settings(), http=HttpSettings(port=0), telemetry=telemetry)) as server:
        body = {"prompt": prompt, "max_tokens": 2, "stream": stream}
        parent = f"00-{trace_id}-b7ad6b7169203331-01"
        reader, writer = await send(server, "POST", "/v1/completions", body, traceparent=parent)
        assert b" 200 " in await reader.readline()
        await reader.read()
        writer.close()
    spans = [json.loads(line) for line in trace_file.read_text(encoding="utf-8").splitlines()]
    decodes = [span for span in spans if span["name"] == "decode"]
    of_caller = [span for span in decodes if span["context"]["trace_id"] == f"0x{trace_id}"]
    assert len(of_caller) == (2 if isinstance(prompt, list) else 1)
    (http,) = [span for span in spans if span["name"] == "POST /v1/completions"]
    assert (http["context"]["trace_id"], http["parent_id"]) == (f"0x{trace_id}", "0xb7ad6b7169203331")
    assert http["attributes"]["http.response.status_code"] == 200
    calls = [span for span in spans if span["name"].endswith("StreamGenerate" if stream else "/Generate")]
    assert {call["parent_id"] for call in calls} == {http["context"]["span_id"]}


async def test_several_prompts_of_a_stream_are_generated_concurrently(gateway: RunningServer) -> None:
    body = {**ENDLESS, "prompt": ["Once upon a time", "The fox"], "stream": True}
    reader, writer = await send(gateway, "POST", "/v1/completions", body)
    indexes: set[int] = set()
    while indexes != {0, 1}:
        line = await reader.readline()
        if line.startswith(b"data: "):
            indexes.add(json.loads(line[6:])["choices"][0]["index"])
    assert len((await asyncio.wrap_future(gateway.engine.state())).in_flight) == 2
    writer.close()
    while (await asyncio.wrap_future(gateway.engine.state())).in_flight:
        pass


async def test_health_and_ready_return_200_while_the_server_runs(gateway: RunningServer) -> None:
    assert await fetch(gateway, "GET", "/health") == (200, {"status": "ok"})
    assert await fetch(gateway, "GET", "/ready") == (200, {"status": "ready"})


async def test_a_draining_server_returns_503(gateway: RunningServer) -> None:
    await gateway.drain()
    status, body = await fetch(gateway, "POST", "/v1/completions", {"prompt": "x"})
    assert (status, body["error"]["code"]) == (503, "unavailable")
    status, body = await fetch(gateway, "GET", "/ready")
    assert (status, body["message"]) == (503, "the gRPC server is shutting down or its engine has stalled")


async def test_other_model_names_are_refused_with_strict_model_names(gateway: RunningServer) -> None:
    status, body = await fetch(gateway, "POST", "/v1/completions", {"model": "gpt-4o", "prompt": "x"})
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    status, body = await fetch(gateway, "POST", "/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 1})
    assert status == 200


async def test_invalid_requests_are_errors_in_openais_format(gateway: RunningServer) -> None:
    for path, body, status in (
        ("/v1/completions", [1], 400),
        ("/v1/completions", {}, 400),
        ("/v1/chat/completions", {"messages": "hello"}, 400),
        ("/v1/completions", b"\xff", 400),
        ("/v1/completions", b"[" * 100_000, 400),
        ("/v1/nothing", {}, 404),
    ):
        actual, response = await fetch(gateway, "POST", path, body)
        assert actual == status
        assert set(response["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET /\xc3\xa9 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /health HTTP/9.9\r\nhost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_not_http_is_an_error_in_openais_format(gateway: RunningServer, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    writer.write(sent)
    status, headers, response = await read_response(reader, writer)
    assert (status, headers["connection"]) == (400, "close")
    assert "Invalid HTTP request" in response["error"]["message"]


@pytest.mark.parametrize("coding", ["gzip", "deflate, br", "x" * 1000])
async def test_a_compressed_body_is_refused_with_the_remedy(gateway: RunningServer, coding: str) -> None:
    status, response = await fetch(gateway, "POST", "/v1/completions", {"prompt": "x"}, content_encoding=coding)
    assert status == 415
    assert "send it uncompressed" in response["error"]["message"]
    assert len(response["error"]["message"]) < 300


@pytest.mark.parametrize(
    ("method", "path", "allow", "message"),
    [
        ("GET", "/v1/completions", "POST", "GET is not allowed for /v1/completions; use POST"),
        ("POST", "/v1/models", "GET, HEAD", "POST is not allowed for /v1/models; use GET"),
        ("PUT", "/", "GET, HEAD", "PUT is not allowed for /; use GET"),
        ("POST", "/static/main.js", "GET, HEAD", "POST is not allowed for /static/main.js; use GET"),
    ],
)
async def test_another_method_is_refused_with_the_allowed_ones(
    gateway: RunningServer, method: str, path: str, allow: str, message: str
) -> None:
    reader, writer = await send(gateway, method, path)
    head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 405 ")
    assert f"\r\nallow: {allow}\r\n".encode() in head + b"\r\n"
    assert json.loads(content)["error"]["message"] == message


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("/v1/nothing", "see /docs for the endpoints"),
        ("/v1/messages", "see /docs for the endpoints"),
        ("/static/nothing", "see /docs for the endpoints"),
        ("/models", "did you mean /v1/models?"),
        ("/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/v1/responses", "did you mean /v1/responses?"),
        ("/v1/model", "did you mean /v1/models?"),
    ],
)
async def test_an_unknown_path_is_no_endpoint(gateway: RunningServer, path: str, remedy: str) -> None:
    status, response = await fetch(gateway, "GET", path)
    assert status == 404
    assert response["error"]["message"] == f"no such endpoint: {path}; {remedy}"


@pytest.mark.parametrize(
    "path", ["/", "/health", "/ready", "/version", "/v1/models", "/v1/models/demo", "/debug/engine", "/docs"]
)
async def test_head_returns_the_status_without_a_body(gateway: RunningServer, path: str) -> None:
    reader, writer = await send(gateway, "HEAD", path)
    head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 200 ")
    assert content == b""


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health/"),
        ("GET", "/version/"),
        ("GET", "/v1/models/"),
        ("GET", "/v1/models/demo//"),
        ("POST", "/v1/completions/"),
        ("POST", "/v1/responses/"),
    ],
)
async def test_a_path_may_end_with_slashes(gateway: RunningServer, method: str, path: str) -> None:
    body = {"prompt" if "completions" in path else "input": "x", "stop": " "} if method == "POST" else None
    (status, response), same = [await fetch(gateway, method, each, body) for each in (path, path.rstrip("/"))]
    assert status == 200
    assert response.keys() == same[1].keys()


@pytest.mark.parametrize(("stream", "path"), [(True, "completions"), (True, "responses"), (False, "completions")])
async def test_a_response_to_http_1_0_has_no_chunks_and_ends_with_the_connection(
    gateway: RunningServer, stream: bool, path: str
) -> None:
    body = {"prompt" if path == "completions" else "input": "x", "stream": stream, "stop": " "}
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    writer.write(f"POST /v1/{path} HTTP/1.0\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    _, headers, received = await read_response(reader, writer)
    assert "transfer-encoding" not in headers
    assert headers["connection"] == "close"
    if stream:
        lines = received.decode().split("\n")
        assert lines.pop() == ""
        assert {line.partition(":")[0] for line in lines} <= {"data", "event", ""}
    else:
        assert received["choices"]


async def test_the_version_is_that_of_the_package(gateway: RunningServer) -> None:
    assert await fetch(gateway, "GET", "/version") == (200, {"version": __version__})


@pytest.mark.parametrize("sent", ["order-17", "x" * 128, "x" * 129, "two words", "é", ""])
async def test_x_request_id_is_returned_if_valid_and_may_be_in_use(gateway: RunningServer, sent: str) -> None:
    body = {"prompt": ["x", "y"], "max_tokens": 1}
    ids = set()
    for connection in [await send(gateway, "POST", "/v1/completions", body, x_request_id=sent) for _ in range(2)]:
        status, headers, response = await read_response(*connection)
        assert status == 200
        assert (headers["x-request-id"] == sent) is (sent in ("order-17", "x" * 128))
        assert response["id"].startswith(f"cmpl-{headers['x-request-id'][:64]}")
        ids.add(response["id"])
    assert len(ids) == 2


async def test_the_log_of_the_server_contains_the_callers_id(
    gateway: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mpt_grpc.access")
    await fetch(gateway, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, x_request_id="order-17")
    await fetch(gateway, "POST", "/v1/completions", {"prompt": 1}, x_request_id="order-18")
    lines = [record.getMessage() for record in caplog.records]
    logged = [(line.split()[0], line.split("request_id='")[1][:9]) for line in lines if "request_id=" in line]
    assert logged == [("Generate", "order-17-"), ("POST", "order-17-"), ("POST", "order-18-")]


@pytest.mark.parametrize(
    "headers", [{}, {"baggage": "a" * 30_000}, {"traceparent": "00-x", "tracestate": "b" * 30_000}]
)
async def test_a_caller_who_leaves_during_an_upload_is_one_bounded_line_of_the_log(
    gateway: RunningServer, caplog: pytest.LogCaptureFixture, headers: dict[str, str]
) -> None:
    caplog.set_level(logging.INFO)
    _, writer = await send(gateway, "POST", "/v1/completions", b"{", length=1000, **headers)
    await writer.drain()
    writer.close()
    lines: list[logging.LogRecord] = []
    while not lines:
        await fetch(gateway, "POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}, **headers)
        lines = [record for record in caplog.records if " /v1/completions 499 " in record.getMessage()]
    assert len(lines) == 1
    assert not [record for record in caplog.records if record.exc_info]
    assert all(len(record.getMessage()) < 500 for record in caplog.records)


async def ended_by_a_shutdown(
    stepped: list[SteppedRunner], path: str, body: dict[str, Any], http_metrics: HttpMetrics | None = None
) -> str:
    """Returns what has been received of a response after the grace period has ended."""
    settings = replace(demo_settings(), http=HttpSettings(port=0), server=ServerSettings(grpc_port=0))
    async with running_server(settings) as server:
        async with running_gateway(
            server.target, "127.0.0.1", HttpSettings(port=0), grace_s=0, http_metrics=http_metrics
        ) as port:
            server.http_port = port
            reader, writer = await send(server, "POST", path, body)
            await asyncio.to_thread(stepped[0].wait_for_step)
            if body["stream"]:
                for _ in range(4):
                    stepped[0].allow()
                await reader.readuntil(b"data: ")
        content = (await reader.read()).rstrip(b"\r\n0").decode()
        writer.close()
        stepped[0].run_free()
    return content


@pytest.mark.parametrize("stream", [False, True])
async def test_the_end_of_the_grace_period_ends_requests_with_an_error(
    stepped: list[SteppedRunner], caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    content = await ended_by_a_shutdown(stepped, "/v1/completions", {**ENDLESS, "stream": stream})
    error = json.loads(content[content.rindex('{"error"') :])["error"]
    assert (error["code"], error["message"]) == ("unavailable", "the server is shutting down")
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_request_ended_by_a_shutdown_is_counted_with_its_status(stepped: list[SteppedRunner]) -> None:
    reader = InMemoryMetricReader()
    metrics = HttpMetrics(MeterProvider([reader]).get_meter("test"))
    await ended_by_a_shutdown(stepped, "/v1/completions", {**ENDLESS, "stream": False}, metrics)
    found = json.loads(reader.get_metrics_data().to_json())["resource_metrics"][0]["scope_metrics"][0]["metrics"]
    (duration,) = [metric for metric in found if metric["name"] == "http.server.request.duration"]
    (point,) = duration["data"]["data_points"]
    attributes = point["attributes"]
    assert (attributes["http.response.status_code"], attributes["error.type"], point["count"]) == (503, "503", 1)


async def test_the_end_of_the_grace_period_ends_the_stream_of_a_response_with_its_failure(
    stepped: list[SteppedRunner],
) -> None:
    content = await ended_by_a_shutdown(stepped, "/v1/responses", {"input": "Hi", "ignore_eos": True, "stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in content.splitlines() if line.startswith("data: ")]
    assert "event: response.failed\n" in content
    assert [event["sequence_number"] for event in events] == list(range(1, 1 + len(events)))  # the first was read
    assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.failed", "failed")
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "the server is shutting down"}
