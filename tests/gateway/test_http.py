"""The gateway as bytes on a connection: what no SDK shows."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import SteppedRunner, demo_settings

from mpt_grpc.gateway import app
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings, ServerSettings

ENDLESS = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture
async def gateway() -> AsyncIterator[RunningServer]:
    settings = replace(demo_settings(), http=HttpSettings(port=0, strict_model_names=True))
    async with running_server(settings) as server:
        yield server


async def send(server: RunningServer, method: str, path: str, body: Any = None, **headers: str) -> Any:
    """Sends a request and returns the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(content)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + content)
    return reader, writer


async def answer(server: RunningServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    reader, writer = await send(server, method, path, body, **headers)
    head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), json.loads(content)


@pytest.fixture
async def held(stepped: list[SteppedRunner]) -> AsyncIterator[RunningServer]:
    """A server whose steps the test allows, and which drains for as long as it takes."""
    settings = replace(demo_settings(), http=HttpSettings(port=0), server=ServerSettings(grpc_port=0, grace_s=600))
    async with running_server(settings) as server:
        yield server
        stepped[0].run_free()


@pytest.mark.parametrize(("stream", "has_begun"), [(False, False), (True, False), (True, True)])
async def test_a_caller_who_leaves_ends_the_call(
    stepped: list[SteppedRunner], held: RunningServer, stream: bool, has_begun: bool
) -> None:
    reader, writer = await send(held, "POST", "/v1/completions", {**ENDLESS, "stream": stream})
    await asyncio.to_thread(stepped[0].wait_for_step)
    if has_begun:
        for _ in range(4):
            stepped[0].allow()
        await reader.readuntil(b"data: ")
    writer.close()
    async with asyncio.timeout(60):
        await held.drain()  # returns when no call is answered any more


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_that_waits_says_so_in_chunks_that_add_nothing(
    stepped: list[SteppedRunner], held: RunningServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(app, "_IDLE_S", 0.05)
    asked = {"max_tokens": 6, "ignore_eos": True, "seed": 1}
    asked |= {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Once"}
    reader, writer = await send(held, "POST", path, {**asked, "stream": True})
    for _ in range(3):
        stepped[0].allow()
    chunks: list[Any] = []
    async for line in reader:
        if line.startswith(b"data: {"):
            chunks.append(json.loads(line[6:]))
            if chunks[-2:] == chunks[-1:] * 2:  # the same twice
                stepped[0].run_free()
    writer.close()
    idle = next(chunk for chunk, following in itertools.pairwise(chunks) if chunk == following)
    assert {chunk["id"] for chunk in chunks} == {idle["id"]}
    assert idle["choices"][0]["finish_reason"] is None
    told = "".join(_text(chunk["choices"][0]) for chunk in chunks)
    whole = (await answer(held, "POST", path, asked))[1]
    assert (_text(idle["choices"][0]), told) == ("", _text(whole["choices"][0]))


def _text(choice: Any) -> str:
    return (
        choice.get("text") or choice.get("delta", {}).get("content") or choice.get("message", {}).get("content") or ""
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
async def test_the_callers_trace_goes_on_behind_the_gateway(tmp_path: Path, stream: bool, prompt: Any) -> None:
    trace_file, trace_id = tmp_path / "spans.jsonl", "0af7651916cd43dd8448eb211c80319c"
    async with running_server(replace(demo_settings(), http=HttpSettings(port=0), trace_file=trace_file)) as server:
        asked = {"prompt": prompt, "max_tokens": 2, "stream": stream}
        parent = f"00-{trace_id}-b7ad6b7169203331-01"
        reader, writer = await send(server, "POST", "/v1/completions", asked, traceparent=parent)
        assert b" 200 " in await reader.readline()
        await reader.read()
        writer.close()
    spans = [json.loads(line) for line in trace_file.read_text(encoding="utf-8").splitlines()]
    decodes = [span for span in spans if span["name"] == "decode"]
    of_the_caller = [span for span in decodes if span["context"]["trace_id"] == f"0x{trace_id}"]
    assert len(of_the_caller) == (2 if isinstance(prompt, list) else 1)


async def test_the_prompts_of_a_stream_are_generated_together(gateway: RunningServer) -> None:
    asked = {**ENDLESS, "prompt": ["Once upon a time", "The fox"], "stream": True}
    reader, writer = await send(gateway, "POST", "/v1/completions", asked)
    indexes: set[int] = set()
    while indexes != {0, 1}:
        line = await reader.readline()
        if line.startswith(b"data: "):
            indexes.add(json.loads(line[6:])["choices"][0]["index"])
    assert len((await asyncio.wrap_future(gateway.engine.state())).in_flight) == 2
    writer.close()
    while (await asyncio.wrap_future(gateway.engine.state())).in_flight:
        pass


async def test_ready_and_health_tell_the_server_and_the_process_apart(gateway: RunningServer) -> None:
    assert await answer(gateway, "GET", "/health") == (200, {"status": "ok"})
    assert await answer(gateway, "GET", "/ready") == (200, {"status": "ready"})


async def test_a_draining_server_answers_503(gateway: RunningServer) -> None:
    await gateway.drain()
    status, body = await answer(gateway, "POST", "/v1/completions", {"prompt": "x"})
    assert (status, body["error"]["code"]) == (503, "unavailable")


async def test_names_are_strict_where_the_server_says_so(gateway: RunningServer) -> None:
    status, body = await answer(gateway, "POST", "/v1/completions", {"model": "gpt-4o", "prompt": "x"})
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    status, body = await answer(gateway, "POST", "/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 1})
    assert status == 200


async def test_what_is_no_request_is_an_error_in_openais_form(gateway: RunningServer) -> None:
    for path, body, status in (
        ("/v1/completions", [1], 400),
        ("/v1/completions", {}, 400),
        ("/v1/chat/completions", {"messages": "hello"}, 400),
        ("/v1/completions", b"\xff", 400),
        ("/v1/completions", b"[" * 100_000, 400),
        ("/v1/nothing", {}, 404),
    ):
        given, said = await answer(gateway, "POST", path, body)
        assert given == status
        assert set(said["error"]) == {"message", "type", "param", "code"}


async def test_another_method_is_told_which_there_is(gateway: RunningServer) -> None:
    reader, writer = await send(gateway, "GET", "/v1/completions")
    said = await reader.read()
    writer.close()
    assert said.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nallow: POST\r\n" in said
    assert b"no such endpoint: GET /v1/completions" in said


async def test_the_callers_request_id_is_the_requests(gateway: RunningServer) -> None:
    asked = {"prompt": "x", "max_tokens": 1}
    status, body = await answer(gateway, "POST", "/v1/completions", asked, x_request_id="order-17")
    assert (status, body["id"]) == (200, "cmpl-order-17")
