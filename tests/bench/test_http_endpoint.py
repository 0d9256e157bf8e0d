"""The HTTP side of the load generator with servers that differ in what they accept and in how they end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from mpt_grpc.bench.endpoint import RequestFailedError
from mpt_grpc.bench.http_endpoint import HttpEndpoint, open_http
from mpt_grpc.errors import BenchmarkError

USAGE = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 7}}
Reply = tuple[int, list[Any] | dict[str, Any]]


def text(*pieces: str) -> list[Any]:
    return [{"choices": [{"text": piece, "finish_reason": None}]} for piece in pieces]


def encoded(reply: Reply) -> bytes:
    """Returns a response: an object, or events in chunks that are cut at every 7 bytes."""
    status, content = reply
    if isinstance(content, dict):
        body = json.dumps(content).encode()
        return b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)
    events = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in content) + b"data: [DONE]\n\n"
    pieces = [events[start : start + 7] for start in range(0, len(events), 7)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 %d x\r\nTransfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n" % (status, chunks)


@asynccontextmanager
async def serving(completion: Callable[[dict[str, Any]], Reply], *, tokenizes: bool = False) -> AsyncIterator[str]:
    """Runs a server that completes with `completion` of the body, and returns its URL."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            path = head.split()[1].decode()
            length = int(head.partition(b"Content-Length: ")[2].split()[0])
            body = json.loads(await reader.readexactly(length) or b"null")
            reply: Reply = (404, {"error": {"message": "no such path"}})
            if path == "/v1/models":
                reply = (200, {"data": [{"id": "m", "max_model_len": 99}]})
            elif path == "/tokenize" and tokenizes:
                reply = (200, {"tokens": [5, 6, 5]})
            elif path.endswith("/completions"):
                reply = completion({**body, "path": path})
            writer.write(encoded(reply))

    connections = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        try:
            await respond(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        await asyncio.gather(*filter(None, connections))  # each ends when its client closes it


def good(_: dict[str, Any]) -> Reply:
    return 200, [*text("", "a", "b", "", "c"), USAGE]


async def test_tokens_are_counted_by_usage_and_shared_out_over_the_messages() -> None:
    async with serving(good) as url, open_http(url, is_chat=False) as endpoint:
        assert (endpoint.model, endpoint.max_context_tokens) == ("m", 99)
        answer = await endpoint.send("x", 7)
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (4, 7)
    assert answer.message_num_tokens == (1, 3, 3)
    assert list(answer.message_times_s) == sorted(answer.message_times_s)


async def test_an_output_without_text_arrives_when_it_ends() -> None:
    ending = {"choices": [{"text": "", "finish_reason": "length"}]}
    async with serving(lambda _: (200, [ending, USAGE])) as url, open_http(url, is_chat=False) as endpoint:
        assert len((await endpoint.send("x", 7)).message_times_s) == 1


async def test_prompts_are_token_ids_of_the_server_or_words() -> None:
    async with serving(good, tokenizes=True) as url, open_http(url, is_chat=False) as endpoint:
        assert set(endpoint.prompt(50, Random(0))) == {5, 6}
        assert len(endpoint.prompt(50, Random(0))) == 50
    async with serving(good) as url, open_http(url, is_chat=False) as endpoint:
        assert len(str(endpoint.prompt(50, Random(0))).split()) == 50


@pytest.mark.parametrize("takes_token_ids", [True, False])
@pytest.mark.parametrize("takes_ignore_eos", [True, False])
async def test_what_a_server_refuses_is_not_sent(takes_token_ids: bool, takes_ignore_eos: bool) -> None:
    accepted: list[dict[str, Any]] = []

    def strict(body: dict[str, Any]) -> Reply:
        if ("ignore_eos" in body and not takes_ignore_eos) or (type(body["prompt"]) is list and not takes_token_ids):
            return 400, {"error": {"message": "no"}}
        accepted.append(body)
        return good(body)

    async with serving(strict, tokenizes=True) as url, open_http(url, is_chat=False) as endpoint:
        await endpoint.send(endpoint.prompt(3, Random()), 7)
    assert type(accepted[-1]["prompt"]) is (list if takes_token_ids else str)
    assert accepted[-1].get("ignore_eos", False) == takes_ignore_eos
    assert accepted[-1]["max_tokens"] == 7
    assert accepted[-1]["stream_options"] == {"include_usage": True}


async def test_chat_sends_messages() -> None:
    bodies = []

    def chat(body: dict[str, Any]) -> Reply:
        bodies.append(body)
        return 200, [{"choices": [{"delta": {"role": "assistant", "content": piece}}]} for piece in ("", "a")] + [USAGE]

    async with serving(chat, tokenizes=True) as url, open_http(url, is_chat=True) as endpoint:
        assert (await endpoint.send("hello", 7)).message_num_tokens == (1,)
    assert bodies[-1]["path"] == "/v1/chat/completions"
    assert bodies[-1]["messages"] == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        ((429, {"error": {"message": "busy"}}), "429"),
        ((503, {}), "503"),
        ((200, [*text("a"), {"error": {"message": "lost"}}]), "error in the stream"),
        ((200, ["no object"]), "invalid stream"),
        ((200, [*text("a"), {"choices": [], "usage": {"tokens": 7}}]), "invalid stream"),
        ((200, text("a")), "no usage in the stream"),
        ((200, [USAGE]), "no output in the stream"),
    ],
)
async def test_a_request_that_fails_has_a_status_and_leaves_the_server_usable(reply: Reply, status: str) -> None:
    replies: list[Reply] = []
    async with (
        serving(lambda body: replies.pop() if replies else good(body)) as url,
        open_http(url, is_chat=False) as endpoint,
    ):
        replies.append(reply)
        with pytest.raises(RequestFailedError) as caught:
            await endpoint.send("x", 7)
        assert caught.value.status == status
        assert (await endpoint.send("x", 7)).num_output_tokens == 7


async def test_a_server_that_is_gone_is_a_lost_connection() -> None:
    endpoint: HttpEndpoint
    async with serving(good) as url, open_http(url, is_chat=False) as endpoint:
        pass
    with pytest.raises(RequestFailedError, match="connection lost"):
        await endpoint.send("x", 7)


@pytest.mark.parametrize("url", ["localhost:8451", "ftp://localhost/v1", "http://", "http://127.0.0.1:1/v1"])
async def test_a_url_without_a_server_is_an_error(url: str) -> None:
    with pytest.raises(BenchmarkError, match=r"^--url: "):
        async with open_http(url, is_chat=False):
            pass


async def test_a_server_that_refuses_every_request_is_an_error_with_its_reason() -> None:
    async with serving(lambda _: (401, {"error": {"message": "no key"}})) as url:
        with pytest.raises(BenchmarkError, match="refuses a request: 401: no key"):
            async with open_http(url, is_chat=False):
                pass
