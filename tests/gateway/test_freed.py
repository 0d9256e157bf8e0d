"""What a request holds is freed when it ends, however it ends, without waiting for a collection of garbage."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from conftest import demo_settings
from http_calls import fetch, send
from starlette.requests import Request

from mpt_grpc.gateway.protocol import BoundedProtocol
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings
from mpt_grpc_client import TokenLogprob
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

PAUSE_S = 0.01
"""Leaves the interpreter to other threads: a loop that asks without pauses would keep it."""
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
REFUSED: dict[str, dict[str, Any]] = {
    TEXT: {"prompt": "Once", "temperature": -1},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "temperature": -1},
}


@pytest.fixture(scope="module")
async def gateway() -> AsyncIterator[RunningServer]:
    async with running_server(replace(demo_settings(), http=HttpSettings(port=0))) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_collections() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def num_messages() -> int:
    """Returns how many requests exist, as messages with their prompts and as requests over HTTP."""
    return sum(type(found) in (pb.GenerateRequest, Request) for found in gc.get_objects())


async def all_are_freed(before: int) -> None:
    async with asyncio.timeout(30):
        while num_messages() > before:  # noqa: ASYNC110
            await asyncio.sleep(PAUSE_S)


@pytest.mark.parametrize("path", REFUSED)
async def test_a_refused_request_is_freed(gateway: RunningServer, path: str) -> None:
    await fetch(gateway, "POST", path, REFUSED[path])
    gc.collect()
    before = num_messages()
    assert (await fetch(gateway, "POST", path, REFUSED[path]))[0] == 400
    await all_are_freed(before)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        (TEXT, {"prompt": "Once", "max_tokens": 3}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 3}),
    ],
)
async def test_an_answered_request_is_freed(
    gateway: RunningServer, path: str, prompt: dict[str, Any], stream: bool
) -> None:
    gc.collect()
    before = num_messages()
    assert (await fetch(gateway, "POST", path, {**prompt, "stream": stream}))[0] == 200
    await all_are_freed(before)


def num_connections() -> int:
    return sum(type(found) is BoundedProtocol for found in gc.get_objects())


STREAM = b'{"prompt": "Once", "max_tokens": 1900, "ignore_eos": true, "stream": true}'


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 60_000,
        b"nothing\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 3,
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 10,
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 90000\r\n\r\n" + b" " * 70_000,
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(STREAM), STREAM)
        + b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 300,
    ],
    ids=["part of a head", "no request", "requests", "many requests", "part of a body", "requests behind a stream"],
)
async def test_a_closed_connection_is_freed(gateway: RunningServer, sent: bytes) -> None:
    gc.collect()
    before = num_connections()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    writer.write(sent)
    async with asyncio.timeout(30):
        while num_connections() == before:  # noqa: ASYNC110
            await asyncio.sleep(PAUSE_S)
        if b"\r\n\r\n" in sent and b" " * 9 not in sent:
            await reader.readline()
        writer.close()
        while num_connections() > before or gateway.engine.num_in_flight:  # noqa: ASYNC110
            await asyncio.sleep(PAUSE_S)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_whose_caller_leaves_is_freed(gateway: RunningServer, stream: bool) -> None:
    gc.collect()
    before = num_messages()
    body = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": stream}
    _, writer = await send(gateway, "POST", TEXT, body)
    async with asyncio.timeout(30):
        while not gateway.engine.num_in_flight or num_messages() <= before:  # noqa: ASYNC110
            await asyncio.sleep(PAUSE_S)
    writer.close()
    await all_are_freed(before)
    async with asyncio.timeout(30):
        while gateway.engine.num_in_flight:  # noqa: ASYNC110
            await asyncio.sleep(PAUSE_S)  # the next test waits for its own request to begin


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (TEXT, {"prompt": "Once", "max_tokens": 900, "logprobs": 1}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 900, "logprobs": True}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 900, "include": ["message.output_text.logprobs"]}),
    ],
)
async def test_a_stream_does_not_keep_the_log_probabilities_that_it_has_sent(
    gateway: RunningServer, path: str, options: dict[str, Any]
) -> None:
    reader, writer = await send(gateway, "POST", path, {**options, "stream": True, "ignore_eos": True})
    num_events = most = 0
    async with asyncio.timeout(60):
        while line := await reader.readline():
            if line.startswith(b"data: "):
                num_events += 1
                if num_events % 20 == 0:
                    most = max(most, sum(type(found) is TokenLogprob for found in gc.get_objects()))
    writer.close()
    assert num_events > 20
    assert most < 450
