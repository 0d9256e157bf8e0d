"""`mpt-grpc gateway` as a process separate from the server."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from otlp_collector import running_collector
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
    (line,) = gateway.stderr.splitlines()
    assert '"POST /v1/completions HTTP/1.1" 200' in line


def test_a_server_killed_during_a_stream_ends_it_with_an_error_event(
    start_gateway: Callable[..., Any], start_server: Callable[..., Any]
) -> None:
    server = start_server()
    gateway = start_gateway("--target", server.target)
    with post(gateway.openai_url, {**BODY, "max_tokens": 1900, "stream": True}) as response:
        assert "choices" in json.loads(response.readline().removeprefix(b"data: "))
        server.kill()
        events = [line.removeprefix(b"data: ") for line in response if line.startswith(b"data: ")]
    assert json.loads(events[-1])["error"]["code"] == "unavailable"
    assert all("choices" in json.loads(event) for event in events[:-1])


def test_the_gateway_reconnects_to_a_restarted_server(
    start_gateway: Callable[..., Any], start_server: Callable[..., Any]
) -> None:
    server = start_server()
    gateway = start_gateway("--target", server.target)
    assert text(post(gateway.openai_url, BODY))
    server.kill()
    with pytest.raises(urllib.error.HTTPError):
        post(gateway.openai_url, BODY)
    start_server("--grpc-port", server.target.rpartition(":")[2])
    while ready(gateway) == 503:
        pass
    assert text(post(gateway.openai_url, BODY))


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
