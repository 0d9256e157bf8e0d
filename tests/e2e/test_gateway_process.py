"""`mpt-grpc gateway` as a process separate from the server."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from otlp_collector import running_collector
from prometheus_client.parser import text_string_to_metric_families
from server_process import running_gateway

BODY = {"prompt": "The fox", "temperature": 0, "max_tokens": 300, "ignore_eos": True}


def post(url: str, body: dict[str, Any]) -> Any:
    """Returns the open response to a POST."""
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode())
    return urllib.request.urlopen(request, timeout=120)


def text(response: Any) -> str:
    return json.load(response)["choices"][0]["text"]


def streamed_text(response: Any) -> str:
    events = [line.removeprefix(b"data: ") for line in response if line.startswith(b"data: ")]
    assert events.pop() == b"[DONE]\n"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_the_gateway_generates_what_the_server_does_and_does_not_load_torch(
    start_gateway: Callable[..., Any], server: Any
) -> None:
    gateway = start_gateway("--target", server.target)
    assert text(post(gateway.openai_url, BODY)) == text(post(server.openai_url, BODY))
    assert "libtorch" not in Path(f"/proc/{gateway.pid}/maps").read_text()


def test_a_stream_finishes_after_sigterm(start_gateway: Callable[..., Any], server: Any) -> None:
    gateway = start_gateway("--target", server.target)
    with post(gateway.openai_url, {**BODY, "stream": True}) as response:
        gateway.terminate()
        assert streamed_text(response) == text(post(server.openai_url, BODY))
    assert gateway.wait() == 0
    begun, line, ended = gateway.stderr.splitlines()
    assert "draining: waiting up to 30 s for requests in progress" in begun
    assert re.search(r" POST /v1/completions 200 \d+\.\d{3} s peer=127\.0\.0\.1:\d+ request_id='\w{32}'$", line)
    assert ended.endswith("stopped")


def test_a_stream_goes_on_at_another_server_and_fails_without_one_until_one_is_back(
    start_gateway: Callable[..., Any], start_server: Callable[..., Any], server: Any
) -> None:
    body = {**BODY, "temperature": 0.8, "seed": 7, "max_tokens": 600}
    first, second = start_server(), start_server()
    second.pause()  # so that the stream begins at the first
    gateway = start_gateway("--target", f"{first.target},{second.target}")
    with post(gateway.openai_url, {**body, "stream": True}) as response:
        event = response.readline()
        first.pause()  # so that the stream does not end before the second can take it over
        second.resume()
        while ready(gateway) == 503:
            pass
        first.kill()
        continued = json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] + streamed_text(response)
    assert continued == text(post(server.openai_url, body))
    assert metrics(second)["mpt_generated_tokens"][0].value > 0
    assert ready(gateway) == 200
    with pytest.raises(urllib.error.HTTPError) as raised:
        page(gateway, "debug/engine")
    assert json.load(raised.value)["error"]["message"].startswith("there are several servers")

    with post(gateway.openai_url, {**BODY, "max_tokens": 1900, "stream": True}) as response:
        assert "choices" in json.loads(response.readline().removeprefix(b"data: "))
        second.kill()
        events = [line.removeprefix(b"data: ") for line in response if line.startswith(b"data: ")]
    assert json.loads(events[-1])["error"]["code"] == "unavailable"
    assert all("choices" in json.loads(event) for event in events[:-1])
    with pytest.raises(urllib.error.HTTPError):
        post(gateway.openai_url, BODY)
    assert ready(gateway) == 503
    start_server("--grpc-port", second.target.rpartition(":")[2])
    while ready(gateway) == 503:
        pass
    assert text(post(gateway.openai_url, BODY))


def test_a_gateway_logs_requests_with_their_durations_ids_and_refusals(
    start_gateway: Callable[..., Any], server: Any
) -> None:
    gateway = start_gateway("--target", server.target, "--log-format", "json")
    post(gateway.openai_url, {**BODY, "max_tokens": 3}).read()
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(gateway.openai_url, {**BODY, "max_tokens": 0.5})
    assert ready(gateway) == 200
    gateway.terminate()
    assert gateway.wait() == 0
    served, refused, *_ = map(json.loads, gateway.stderr.splitlines())
    for one, status in ((served, 200), (refused, 400)):
        assert one["message"] == f"POST /v1/completions {status}"
        assert (one["method"], one["path"], one["http_status"]) == ("POST", "/v1/completions", status)
        assert one["duration_s"] > 0
    assert refused["request_id"] == raised.value.headers["x-request-id"] != served["request_id"]
    assert refused["error"].startswith("max_tokens: ")
    assert "/ready" not in gateway.stderr


def page(process: Any, path: str) -> str:
    with urllib.request.urlopen(process.openai_url.removesuffix("v1") + path, timeout=60) as response:
        return response.read().decode()


def metrics(process: Any) -> dict[str, list[Any]]:
    """Returns the samples of each metric."""
    return {family.name: family.samples for family in text_string_to_metric_families(page(process, "metrics"))}


def test_a_gateway_has_metrics_of_its_own(start_gateway: Callable[..., Any], server: Any) -> None:
    gateway = start_gateway("--target", server.target)
    post(gateway.openai_url, {**BODY, "max_tokens": 3}).read()
    for body in ({"max_tokens": -1}, {"max_tokens": 0.5}):
        with pytest.raises(urllib.error.HTTPError):
            post(gateway.openai_url, body)
    with pytest.raises(urllib.error.HTTPError):
        page(gateway, "missing/whatever")
    url = urlsplit(gateway.openai_url)
    with socket.create_connection((url.hostname, url.port)) as unfinished:
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\nexpect: 100-continue\r\n\r\n"
        unfinished.sendall(head.encode())
        assert unfinished.recv(100).startswith(b"HTTP/1.1 100 ")  # the gateway waits for the body
        by_name = metrics(gateway)
    counts = {
        (one.labels["http_route"], one.labels["http_request_method"], one.labels["http_response_status_code"]): (
            one.value
        )
        for one in by_name["http_server_request_duration_seconds"]
        if one.name.endswith("_count")
    }
    assert counts == {
        ("/v1/completions", "POST", "200"): 1,
        ("/v1/completions", "POST", "400"): 2,
        ("", "GET", "404"): 1,
    }
    active = {one.labels["http_request_method"]: one.value for one in by_name["http_server_active_requests"]}
    assert active == {"POST": 1, "GET": 1}  # the unfinished request, and the page itself
    assert 'service_name="mpt-grpc-gateway"' in page(gateway, "metrics")


def ready(gateway: Any) -> int:
    try:
        with urllib.request.urlopen(gateway.openai_url.removesuffix("v1") + "ready", timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_without_a_server_requests_fail_with_503(start_gateway: Callable[..., Any]) -> None:
    gateway = start_gateway("--target", "localhost:1")
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(gateway.openai_url, BODY)
    assert raised.value.code == 503
    assert json.load(raised.value)["error"]["code"] == "unavailable"


def test_a_port_in_use_is_one_line(start_gateway: Callable[..., Any]) -> None:
    port = start_gateway().openai_url.split(":")[2].removesuffix("/v1")
    command = (sys.executable, "-m", "mpt_grpc.cli", "gateway", "--http-port", port)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"mpt-grpc: --http-port: cannot listen on 127.0.0.1:{port}")


def test_a_gateway_exports_the_spans_of_its_requests(server: Any) -> None:
    trace_id, caller_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with (
        running_collector() as (collector, endpoint),
        running_gateway("--target", server.target, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as gateway,
    ):
        body = json.dumps({**BODY, "max_tokens": 3}).encode()
        headers = {"traceparent": f"00-{trace_id}-{caller_id}-01"}
        request = urllib.request.Request(f"{gateway.openai_url}/completions", body, headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            assert response.status == 200
        gateway.terminate()
        assert gateway.wait() == 0
    (span,) = collector.spans
    assert (span.name, span.parent_span_id.hex()) == ("POST /v1/completions", caller_id)
