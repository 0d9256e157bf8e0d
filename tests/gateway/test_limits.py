"""What a request may send is bounded: in time, in size and in number, before any of it is served."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from conftest import demo_settings
from http_calls import fetch, read_response, send
from pydantic import BaseModel, model_validator
from starlette.requests import Request
from starlette.responses import Response

from mpt_grpc.gateway import protocol, reading
from mpt_grpc.gateway.errors import BadRequestError
from mpt_grpc.gateway.field_rules import FieldRules
from mpt_grpc.gateway.middleware import SMALL_BODY_BYTES, BodyMemoryMiddleware
from mpt_grpc.gateway.parsing import MAX_NAMES, MAX_VALUES, parse
from mpt_grpc.gateway.reading import MAX_BODY_BYTES
from mpt_grpc.gateway.strict import MAX_ITEMS
from mpt_grpc.limits import MAX_LOGPROBS, MAX_TEXT_CHARACTERS, MAX_TOKEN_IDS
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings
from mpt_grpc_client import OverloadedError

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
F = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
async def gateway() -> AsyncIterator[RunningServer]:
    settings = demo_settings(max_running_requests=8, max_waiting_requests=24)
    async with running_server(replace(settings, http=HttpSettings(port=0))) as server:
        yield server


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"prompt": [[1]] * 33}, "prompt"),
        ({"prompt": [{}] * 33}, "prompt"),
        ({"prompt": ["a"] * 11, "n": 3}, "n"),
        ({"prompt": "a", "n": 33, "echo": True, "stream": True}, "n"),
        ({"prompt": "a", "n": (1 << 32) - 1, "echo": True, "stream": True}, "n"),
    ],
)
async def test_more_outputs_than_the_queue_holds_are_refused(
    gateway: RunningServer, fields: dict[str, Any], param: str
) -> None:
    status, response = await fetch(gateway, "POST", TEXT, fields)
    assert (status, response["error"]["param"]) == (400, param)
    assert "32" in response["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"messages": [dict.fromkeys(map(str, range(MAX_ITEMS + 1)), 1)]}, "messages[0]"),
        ({"messages": [USER], "tools": [dict.fromkeys(map(str, range(MAX_ITEMS + 1)), 1)]}, "tools[0]"),
    ],
)
async def test_fields_of_objects_are_counted_before_they_are_validated(
    gateway: RunningServer, fields: dict[str, Any], where: str
) -> None:
    status, response = await fetch(gateway, "POST", CHAT, fields)
    assert status == 400
    assert response["error"]["message"] == f"{where}: {MAX_ITEMS + 1} fields; at most {MAX_ITEMS} are allowed"


async def test_as_many_outputs_as_the_queue_holds_are_generated(gateway: RunningServer) -> None:
    body = {"prompt": ["a"] * 16, "n": 2, "max_tokens": 1, "ignore_eos": True}
    status, response = await fetch(gateway, "POST", TEXT, body)
    assert (status, len(response["choices"])) == (200, 32)


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (CHAT, "messages", [USER] * (MAX_ITEMS + 1)),
        (CHAT, "messages", [{}] * (MAX_ITEMS + 1)),
        (CHAT, "tools", [{}] * (MAX_ITEMS + 1)),
        (TEXT, "stop", ["a"] * (MAX_ITEMS + 1)),
        (TEXT, "guided_choice", [None] * (MAX_ITEMS + 1)),
        (TEXT, "logit_bias", dict.fromkeys(range(MAX_ITEMS + 1), "x")),
        (TEXT, "no_such_field", [{}] * (MAX_ITEMS + 1)),
    ],
)
async def test_items_are_counted_before_they_are_validated(
    gateway: RunningServer, path: str, name: str, value: Any
) -> None:
    status, response = await fetch(gateway, "POST", path, {name: value})
    why = f"{name}: {MAX_ITEMS + 1} items; at most {MAX_ITEMS} are allowed in one request"
    assert (status, response["error"]["message"], response["error"]["param"]) == (400, why, name)


@pytest.mark.parametrize("item", [1, {"type": "function", "function": {"name": "f"}}])
async def test_allowed_tools_are_counted_before_they_are_validated(gateway: RunningServer, item: Any) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [item] * 129}}
    status, response = await fetch(gateway, "POST", CHAT, {"messages": [USER], "tool_choice": choice})
    why = "tool_choice.allowed_tools.tools: 129 items; at most 128 are allowed in one request"
    assert (status, response["error"]["message"]) == (400, why)


async def test_the_parts_of_a_message_are_counted(gateway: RunningServer) -> None:
    content = [{"type": "text", "text": "a"}] * (MAX_ITEMS + 1)
    status, response = await fetch(gateway, "POST", CHAT, {"messages": [USER, {**USER, "content": content}]})
    assert status == 400
    assert response["error"]["message"].startswith(f"messages[1].content: {MAX_ITEMS + 1} items; at most ")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}",
        json.dumps(dict.fromkeys(map(str, range(MAX_ITEMS + 1)), 1)).encode(),
        b'{"prompt": [' + b"1," * MAX_VALUES + b"1]}",
        b'{"stop": [' + b'"\\",",' * MAX_VALUES + b'""]}',
        b'{"messages": [' + b"{}," * MAX_VALUES + b"{}]}",
        b'{"metadata": [' + b'{"":[],"":0},' * (MAX_NAMES // 2 + 1) + b"{}]}",
        b'{"prompt": "' + b"," * (MAX_VALUES + 1),
        b'{"prompt": "' + b'\\",' * (MAX_VALUES + 1),
        b'{"\\ud83d": 1}',
        b'{"messages": [{"role": "user", "content": "a", "\\udc00": 1}]}',
        b'{"prompt": "\xed\xa0\x80"}',
        json.dumps({"messages": [USER], "tools": [F], "tool_choice": {**F, "function": {"name": "g" * 9999}}}).encode(),
        '{"prompt": "a"}'.encode("utf-16"),
        b'{"prompt": "a", "' + b"x" * 1_000_000 + b'": 1}',
        b'{"prompt": "a", "n": 1' + b"0" * 5000 + b"}",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1' + b"0" * 5000 + b".0}",
        b'{"messages": [], "tools": [{"function": {"parameters": {"maximum": 1e400}}}]}',
    ],
    ids=lambda body: body[:24].decode(errors="replace"),
)
async def test_a_body_that_is_no_request_is_refused_with_a_short_error(gateway: RunningServer, body: bytes) -> None:
    status, response = await fetch(gateway, "POST", CHAT if b"messages" in body else TEXT, body)
    assert status == 400
    assert len(response["error"]["message"]) < 500


async def test_as_many_token_ids_may_be_sent_as_the_server_takes(gateway: RunningServer) -> None:
    status, response = await fetch(gateway, "POST", "/detokenize", {"tokens": [65] * MAX_TOKEN_IDS})
    assert (status, len(response["prompt"])) == (200, MAX_TOKEN_IDS)
    body = {"prompt": [5] * MAX_TOKEN_IDS, "truncate_prompt_tokens": 5, "max_tokens": 1}
    status, response = await fetch(gateway, "POST", TEXT, body)
    assert (status, response["usage"]["prompt_tokens"]) == (200, 5)


async def test_more_log_probabilities_than_a_response_may_have_are_refused(gateway: RunningServer) -> None:
    # 32 prompts with two tokens more than 1,560 each, and 21 log probabilities for each token.
    body = {"prompt": ["a"] * 32, "max_tokens": 1562, "logprobs": 20}
    status, response = await fetch(gateway, "POST", TEXT, body)
    assert (status, response["error"]["param"]) == (400, "logprobs")
    assert f"1049664 log probabilities with their alternatives; at most {MAX_LOGPROBS}" in response["error"]["message"]


async def test_text_may_consist_of_characters_that_separate_values(gateway: RunningServer) -> None:
    text = ',[{:"\\' * (MAX_TEXT_CHARACTERS // 6)
    assert 3 * sum(map(text.count, ",[{")) > MAX_VALUES
    body = {"prompt": [text] * 3, "truncate_prompt_tokens": 5, "max_tokens": 1}
    status, response = await fetch(gateway, "POST", TEXT, body)
    assert (status, response["usage"]["prompt_tokens"]) == (200, 15)


async def test_the_longest_text_may_be_escaped(gateway: RunningServer) -> None:
    body = {"prompt": "é" * MAX_TEXT_CHARACTERS, "truncate_prompt_tokens": 5, "max_tokens": 1}
    status, response = await fetch(gateway, "POST", TEXT, body)
    assert (status, response["usage"]["prompt_tokens"]) == (200, 5)


@pytest.mark.parametrize("path", [TEXT, CHAT, "/tokenize", "/detokenize"])
async def test_a_body_that_is_too_long_is_refused_by_its_length(gateway: RunningServer, path: str) -> None:
    status, _, response = await read_response(*await send(gateway, "POST", path, length=MAX_BODY_BYTES + 1))
    assert (status, response["error"]["message"]) == (413, "the body exceeds 4 MiB; shorten the prompt")


async def test_a_body_without_a_length_is_refused_when_it_gets_too_long(gateway: RunningServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
    status = asyncio.ensure_future(reader.readline())
    piece = b"%x\r\n%b\r\n" % (1 << 16, b" " * (1 << 16))
    for _ in range(MAX_BODY_BYTES // (1 << 16)):
        writer.write(piece)
        await writer.drain()
    writer.write(piece)
    assert (await status).startswith(b"HTTP/1.1 413 ")
    writer.close()


@pytest.mark.parametrize("sent", [b"{", b""])
async def test_a_body_that_stalls_is_ended(
    gateway: RunningServer, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(reading, "STALL_TIMEOUT_S", 0.05)
    status, headers, response = await read_response(*await send(gateway, "POST", TEXT, sent, length=1000))
    assert (status, headers["connection"]) == (408, "close")
    assert response["error"]["message"].startswith("the body was not received within ")


async def test_a_body_that_trickles_is_ended(gateway: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BODY_TIMEOUT_S", 0.3)
    reader, writer = await send(gateway, "POST", TEXT, b" ", length=1000)
    # What is written after the end resets the connection, at which the rest of the response may be lost.
    status = asyncio.ensure_future(reader.readline())
    while not status.done():
        writer.write(b" ")
        await asyncio.wait({status}, timeout=0.02)
    writer.close()
    assert status.result().startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"G",
        b"\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /health HTTP/1.1\r\n",
        b"POST /nothing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{",
    ],
)
async def test_connections_that_send_no_complete_request_are_closed(
    gateway: RunningServer, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    connections = [await asyncio.open_connection("127.0.0.1", gateway.http_port) for _ in range(50)]
    for _, writer in connections:
        writer.write(sent)
    async with asyncio.timeout(30):
        await asyncio.gather(*(reader.read() for reader, _ in connections))
    for _, writer in connections:
        writer.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * (1 << 17),
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * (65 << 10) + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x: a\r\n" * 200 + b"\r\n",
        b"GET /" + b"a" * (1 << 17),
    ],
)
async def test_headers_that_are_too_many_or_too_long_are_refused(gateway: RunningServer, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    writer.write(sent)
    head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    assert head.startswith(b"HTTP/1.1 431 ")
    assert b"content-type: application/json" in head


@pytest.mark.parametrize("sent", [b"1;" + b"a" * (1 << 20), b"1\r\na\r\n0\r\n" + b"x: a\r\n" * (1 << 18)])
async def test_chunk_extensions_and_trailers_are_bounded(gateway: RunningServer, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n" + sent)
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionResetError):
            assert (await reader.read())[:10] in (b"", b"HTTP/1.1 4")
    writer.close()


async def test_pipelined_requests_are_answered_in_turn(gateway: RunningServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port, limit=1 << 24)
    bodies = [json.dumps({"prompt": "a b" * number}).encode() for number in range(1, 301)]
    requests = [
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(b), b) for b in bodies
    ]
    writer.write(b"".join(requests))
    counts = []
    for _ in bodies:
        await reader.readuntil(b'{"count":')
        counts.append(int((await reader.readuntil(b",")).rstrip(b",")))
    writer.close()
    assert counts == sorted(set(counts))


async def test_a_pipelined_request_has_as_long_as_any_other(
    gateway: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port, limit=1 << 24)
    for prompt, max_tokens in (("a", 10), ("a" * 9000, 1000)):
        fields = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        body = json.dumps({**fields, "truncate_prompt_tokens": 8}).encode()
        writer.write(
            b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (TEXT.encode(), len(body), body)
        )
    for _ in range(2):
        await reader.readuntil(b"data: [DONE]")
    writer.close()


async def test_a_caller_who_leaves_is_noticed_though_another_request_waits(gateway: RunningServer) -> None:
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True}
    _, writer = await send(gateway, "POST", TEXT, body, connection="keep-alive")
    writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    while not gateway.engine.num_in_flight:
        await fetch(gateway, "GET", "/health")
    num_steps = gateway.engine.load.num_steps
    writer.close()
    while gateway.engine.num_in_flight:
        await fetch(gateway, "GET", "/health")
    assert gateway.engine.load.num_steps - num_steps < 1000


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_request_that_asks_for_another_protocol_is_served_like_any_other(
    gateway: RunningServer, protocol: bytes, framing: str
) -> None:
    """With its body and the request after it, however they are divided into pieces."""
    body = json.dumps({"prompt": "a" * 9000}).encode()
    length, content = b"content-length: %d" % len(body), body
    if framing == "chunks":
        length, content = b"transfer-encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade\r\nupgrade: %b\r\n%b\r\n\r\n"
    sent = head % (protocol, length) + content
    sent += b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    for size in (len(sent), 40, 1000):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
        for start in range(0, len(sent), size):
            writer.write(sent[start : start + size])
            await writer.drain()
        async with asyncio.timeout(30):
            received = await reader.read()
        writer.close()
        assert received.count(b"HTTP/1.1 200 OK") == 2
        assert b'"count":' in received
        assert received.endswith(b'{"status":"ok"}')


async def test_what_comes_after_the_last_request_of_a_connection_does_not_cost_its_response(
    gateway: RunningServer,
) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: %b, close\r\nupgrade: h2c\r\n\r\n"
    for connection in (b"Upgrade", b"keep-alive"):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
        writer.write(head % connection + b"more")
        async with asyncio.timeout(30):
            assert (await reader.read()).endswith(b'{"status":"ok"}')
        writer.close()


async def test_the_gateway_is_no_proxy(gateway: RunningServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    writer.write(b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost:80\r\n\r\n")
    async with asyncio.timeout(30):
        assert (await reader.read()).startswith(b"HTTP/1.1 405 ")
    writer.close()


async def test_trailers_are_no_headers(gateway: RunningServer) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    )
    body = b'{"prompt": "a", "max_tokens": 1}'
    trailers = b"host: evil.example\r\ncontent-encoding: gzip\r\n"
    writer.write(head + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers))
    status, _, _ = await read_response(reader, writer)
    assert status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, b'{"prompt": [' + b",".join([b"[" + b"1," * 7000 + b"1]"] * 32) + b'], "max_tokens": 1}'),
        (CHAT, json.dumps({"messages": [{**USER, "content": [{"type": "text", "text": "a"}] * 80}] * 1000}).encode()),
        (TEXT, json.dumps({"prompt": "é" * MAX_TEXT_CHARACTERS}).encode()),
        (TEXT, b'{"prompt": "' + b'\\",' * (1 << 20) + b'"}'),
    ],
    ids=["token IDs", "parts", "escapes", "quotes"],
)
async def test_the_largest_bodies_keep_the_event_loop_for_less_than_a_quarter_second(
    gateway: RunningServer, path: str, body: bytes
) -> None:
    """The time is that of the loop's own thread, which does not depend on the machine's load."""
    gc.collect()
    gc.freeze()  # as a server does: a collection that scans all the objects of the tests would count
    longest_s, last_s = 0.0, time.thread_time()
    response = asyncio.ensure_future(fetch(gateway, "POST", path, body))
    while not response.done():
        await asyncio.wait({response}, timeout=0.001)
        longest_s, last_s = max(longest_s, time.thread_time() - last_s), time.thread_time()
    gc.unfreeze()
    assert response.result()[0] == 400
    assert longest_s < 0.25


async def test_a_caller_who_leaves_before_the_body_is_parsed_is_no_longer_waited_for() -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    class Slow(BaseModel):
        @model_validator(mode="before")
        @classmethod
        def _wait(cls, value: Any) -> Any:
            has_begun.set()
            may_end.wait(30)
            return value

    def request(last: str) -> Request:
        body = json.dumps({"padding": "x" * SMALL_BODY_BYTES}).encode()
        messages = iter([{"type": "http.request", "body": body}, {"type": last}])

        async def receive() -> Any:
            if (message := next(messages))["type"] == "wait":
                await asyncio.Event().wait()
            return message

        return Request({"type": "http", "method": "POST", "headers": []}, receive)

    slow = asyncio.create_task(parse(request("wait"), Slow, FieldRules(), lambda body: body))
    await asyncio.to_thread(has_begun.wait, 30)
    try:
        with pytest.raises(BadRequestError, match="disconnected") as left:
            await asyncio.wait_for(parse(request("http.disconnect"), Slow, FieldRules(), lambda body: body), 30)
        assert left.value.status == 499
        assert not slow.done()
    finally:
        may_end.set()
    await slow


async def test_bodies_share_a_bounded_memory() -> None:
    """A large body is refused while others hold the memory; small ones are served, and it is freed with responses."""
    is_read, may_respond = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).body()
        is_read.set()
        if len(body) > SMALL_BODY_BYTES:
            await may_respond.wait()
        await Response()(scope, receive, send)

    bounded = BodyMemoryMiddleware(app, max_bytes=1 << 20)

    async def request(size: int) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"a" * size}

        async def send(message: Any) -> None:
            pass

        await bounded({"type": "http", "method": "POST", "headers": []}, receive, send)

    first = asyncio.create_task(request(1 << 20))
    await is_read.wait()
    with pytest.raises(OverloadedError, match="too many large requests"):
        await request(SMALL_BODY_BYTES * 3)
    await request(SMALL_BODY_BYTES)
    may_respond.set()
    await first
    await request(1 << 20)
