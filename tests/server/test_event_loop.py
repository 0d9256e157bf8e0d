"""What large messages cost the event loop, which serves all other streams meanwhile."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from conftest import demo_settings

from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

NUM_TRIES = 5
ONE_TOKEN = pb.StoppingCriteria(max_new_tokens=1)
MANY_TURNS = [{"role": number % 2 + 2, "content": "hello there " * 85} for number in range(1023)]
LONG_LIST = list(range(150_000))
MESSAGES = {
    "token IDs": pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * (1 << 18)), truncate_prompt_tokens=10),
    "messages": pb.GenerateRequest(conversation=pb.Conversation(messages=MANY_TURNS, drop_oldest_turns=True)),
    "an ID that is too long": pb.GenerateRequest(text="Once", request_id="é" * 1_000_000),
    "biases that are not valid": pb.GenerateRequest(
        text="Once", decoding=pb.DecodingOptions(logit_bias={number + 10**6: 1e9 for number in range(1024)})
    ),
}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
FORMAT = {"type": "json_schema", "json_schema": {"name": "large", "schema": {"enum": LONG_LIST}}}
BODIES: dict[str, dict[str, Any]] = {
    "tools that are too long": {
        "tools": [{"type": "function", "function": {"name": "large", "parameters": {"enum": LONG_LIST}}}]
    },
    "arguments of the template that are too long": {"chat_template_kwargs": {"large": LONG_LIST}},
    "a schema that is too long": {"response_format": FORMAT},
}


@dataclass
class Served:
    server: RunningServer
    loop: asyncio.AbstractEventLoop

    def loop_seconds(self, call: Callable[[], object]) -> float:
        """Returns the processor time of the event loop during a call, the least of several tries."""
        return min(self._try(call) for _ in range(NUM_TRIES))

    def _try(self, call: Callable[[], object]) -> float:
        start_s = self._time_s()
        call()
        return self._time_s() - start_s

    def _time_s(self) -> float:
        async def time_s() -> float:
            return time.thread_time()

        return asyncio.run_coroutine_threadsafe(time_s(), self.loop).result()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A server whose event loop has a thread of its own."""
    started, serving = threading.Event(), list[Served]()
    stop = asyncio.Event()

    async def serve() -> None:
        settings = demo_settings()
        async with running_server(replace(settings, http=replace(settings.http, port=0))) as server:
            serving.append(Served(server, asyncio.get_running_loop()))
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(timeout=60)
    yield serving[0]
    serving[0].loop.call_soon_threadsafe(stop.set)
    thread.join()


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_large_message_costs_the_event_loop_little_more_than_a_small_one(served: Served, kind: str) -> None:
    large = pb.GenerateRequest(stopping=ONE_TOKEN)
    large.MergeFrom(MESSAGES[kind])
    with grpc.insecure_channel(served.server.target) as channel:
        generate = channel.unary_unary("/mpt.v1.TextGenerationService/Generate")

        def call(message: pb.GenerateRequest) -> None:
            with suppress(grpc.RpcError):
                generate(message.SerializeToString(), timeout=60)

        call(large)
        small_s = served.loop_seconds(lambda: call(pb.GenerateRequest(text="Once", stopping=ONE_TOKEN)))
        assert served.loop_seconds(lambda: call(large)) < 2.5 * small_s


@pytest.mark.parametrize("kind", BODIES)
def test_a_large_body_costs_the_event_loop_little_more_than_a_small_one(served: Served, kind: str) -> None:
    def call(fields: dict[str, Any]) -> None:
        assert served.server.http_port is not None
        connection = http.client.HTTPConnection("127.0.0.1", served.server.http_port)
        connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT, **fields}))
        connection.getresponse().read()
        connection.close()

    call(BODIES[kind])
    small_s = served.loop_seconds(lambda: call({}))
    assert served.loop_seconds(lambda: call(BODIES[kind])) < 4 * small_s
