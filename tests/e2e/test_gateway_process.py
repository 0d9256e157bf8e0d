"""`mpt-grpc gateway` as a process of its own, in front of a server elsewhere."""

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

ASKED = {"prompt": "The fox", "temperature": 0, "max_tokens": 300, "ignore_eos": True}


def post(url: str, body: dict[str, Any]) -> Any:
    """The open answer to a POST."""
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode())
    return urllib.request.urlopen(request, timeout=120)


def text(answer: Any) -> str:
    return json.load(answer)["choices"][0]["text"]


def streamed_text(answer: Any) -> str:
    events = [line.removeprefix(b"data: ") for line in answer if line.startswith(b"data: ")]
    assert events.pop() == b"[DONE]\n"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_it_answers_as_the_server_behind_it_and_needs_no_torch(start_gateway: Callable[..., Any], server: Any) -> None:
    gateway = start_gateway("--target", server.target)
    assert text(post(gateway.openai_url, ASKED)) == text(post(server.openai_url, ASKED))
    assert "libtorch" not in Path(f"/proc/{gateway.pid}/maps").read_text()


def test_sigterm_lets_a_stream_finish(start_gateway: Callable[..., Any], server: Any) -> None:
    gateway = start_gateway("--target", server.target)
    with post(gateway.openai_url, {**ASKED, "stream": True}) as answer:
        gateway.terminate()
        assert streamed_text(answer) == text(post(server.openai_url, ASKED))
    assert gateway.wait() == 0
    assert not gateway.stderr


def test_a_server_that_dies_in_mid_stream_is_an_event_that_says_so(
    start_gateway: Callable[..., Any], start_server: Callable[..., Any]
) -> None:
    server = start_server()
    gateway = start_gateway("--target", server.target)
    with post(gateway.openai_url, {**ASKED, "max_tokens": 1900, "stream": True}) as answer:
        assert "choices" in json.loads(answer.readline().removeprefix(b"data: "))
        server.kill()
        events = [line.removeprefix(b"data: ") for line in answer if line.startswith(b"data: ")]
    assert json.loads(events[-1])["error"]["code"] == "unavailable"
    assert all("choices" in json.loads(event) for event in events[:-1])


def test_it_finds_a_server_that_comes_back(start_gateway: Callable[..., Any], start_server: Callable[..., Any]) -> None:
    server = start_server()
    gateway = start_gateway("--target", server.target)
    assert text(post(gateway.openai_url, ASKED))
    server.kill()
    with pytest.raises(urllib.error.HTTPError):
        post(gateway.openai_url, ASKED)
    start_server("--grpc-port", server.target.rpartition(":")[2])
    while ready(gateway) == 503:
        pass
    assert text(post(gateway.openai_url, ASKED))


def ready(gateway: Any) -> int:
    try:
        with urllib.request.urlopen(gateway.openai_url.removesuffix("v1") + "ready", timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_without_a_server_it_starts_and_says_what_is_missing(start_gateway: Callable[..., Any]) -> None:
    gateway = start_gateway("--target", "localhost:1")
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(gateway.openai_url, ASKED)
    assert raised.value.code == 503
    assert json.load(raised.value)["error"]["code"] == "unavailable"


def test_a_port_that_is_taken_is_one_line(start_gateway: Callable[..., Any]) -> None:
    port = start_gateway().openai_url.split(":")[2].removesuffix("/v1")
    command = (sys.executable, "-m", "mpt_grpc.cli", "gateway", "--http-port", port)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"mpt-grpc: --http-port: cannot listen on 127.0.0.1:{port}")
