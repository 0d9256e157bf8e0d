"""How long large messages hold up the event loop, which serves all other streams meanwhile."""

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
from processor_time import processor_seconds

from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1 import text_generation_pb2_grpc as pb_grpc

NUM_TRIES = 5
ONE_TOKEN = pb.StoppingCriteria(max_new_tokens=1)
MANY_TURNS = [{"role": number % 2 + 2, "content": "hello there " * 85} for number in range(1023)]
IDS = [5] * (1 << 18)
TEXT_OF_IDS = json.dumps(IDS)
LONG_LIST = list(range(150_000))
STOPS = [f"{letter}{'~' * 200}" for letter in "abcdefghijklmnop"]
MESSAGES = {
    "token IDs": pb.GenerateRequest(token_ids=pb.TokenIds(ids=IDS), truncate_prompt_tokens=10),
    "messages": pb.GenerateRequest(conversation=pb.Conversation(messages=MANY_TURNS, drop_oldest_turns=True)),
    "an ID that is too long": pb.GenerateRequest(text="Once", request_id="é" * 1_000_000),
    "biases that are not valid": pb.GenerateRequest(
        text="Once", decoding=pb.DecodingOptions(logit_bias={number + 10**6: 1e9 for number in range(1024)})
    ),
    "outputs that are resumed": pb.GenerateRequest(
        text="Once",
        sampling=pb.SamplingParameters(num_sequences=16, temperature=0),
        resume_outputs=[pb.PartialOutput(index=index, token_ids=[300] * 2000) for index in range(16)],
        stopping=pb.StoppingCriteria(max_new_tokens=2000, ignore_eos=True, stop_strings=STOPS),
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

    def longest_turn_s(self, call: Callable[[], object]) -> float:
        """Returns the processor time of the longest turn of the event loop during a call; the least of several."""
        return min(self._longest_turn_s(call) for _ in range(NUM_TRIES))

    def _longest_turn_s(self, call: Callable[[], object]) -> float:
        times_s = [0.0]
        is_over, has_ended = threading.Event(), threading.Event()

        def turn(last_s: float) -> None:
            now_s = time.thread_time()
            times_s.append(now_s - last_s)
            if is_over.is_set():
                has_ended.set()
            else:
                self.loop.call_later(0.0005, turn, time.thread_time())

        self.loop.call_soon_threadsafe(lambda: turn(time.thread_time()))
        call()
        is_over.set()
        assert has_ended.wait(timeout=60)
        return max(times_s)


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


@pytest.fixture(scope="module")
def unnoticed_s() -> float:
    """The processor time that a large message may add to a turn: a third of what Python takes to read a list of IDs."""
    return min(processor_seconds(lambda: json.loads(TEXT_OF_IDS)) for _ in range(NUM_TRIES)) / 3


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_large_message_holds_up_the_event_loop_little_longer_than_a_small_one(
    served: Served, unnoticed_s: float, kind: str
) -> None:
    large = pb.GenerateRequest(stopping=ONE_TOKEN)
    large.MergeFrom(MESSAGES[kind])
    with grpc.insecure_channel(served.server.target) as channel:
        generate = channel.unary_unary("/mpt.v1.TextGenerationService/Generate")

        def call(message: pb.GenerateRequest) -> None:
            with suppress(grpc.RpcError):
                generate(message.SerializeToString(), timeout=60)

        call(large)
        small_s = served.longest_turn_s(lambda: call(pb.GenerateRequest(text="Once", stopping=ONE_TOKEN)))
        assert served.longest_turn_s(lambda: call(large)) < small_s + unnoticed_s


def test_a_large_answer_holds_up_the_event_loop_for_less_time_than_it_takes_to_serialize(served: Served) -> None:
    options = pb.OutputOptions(return_logprobs=True, top_logprobs=20)
    large = pb.GenerateRequest(
        text="Once",
        sampling=pb.SamplingParameters(num_sequences=16, temperature=0),
        stopping=pb.StoppingCriteria(max_new_tokens=250, ignore_eos=True),
        output_options=options,
    )
    small = pb.GenerateRequest(text="Once", stopping=ONE_TOKEN, output_options=options)
    with grpc.insecure_channel(served.server.target) as channel:
        generate = pb_grpc.TextGenerationServiceStub(channel).Generate
        answer = generate(large, timeout=60)
        assert [len(output.logprobs) for output in answer.outputs] == [250] * 16
        small_s = served.longest_turn_s(lambda: generate(small, timeout=60))
        large_s = served.longest_turn_s(lambda: generate(large, timeout=60))
    assert large_s < small_s + min(processor_seconds(answer.SerializeToString) for _ in range(NUM_TRIES)) / 2


TRANSLATED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "messages": ("/v1/chat/completions", CHAT, {"messages": CHAT["messages"] * 1023}),
    "token IDs": ("/v1/completions", {"prompt": [5], "max_tokens": 1}, {"prompt": IDS}),
    "tokens": ("/detokenize", {"tokens": [5]}, {"tokens": IDS}),
}
"""Bodies of which the client library makes large messages; most are refused for the length of the prompt."""


@pytest.mark.parametrize("kind", TRANSLATED)
def test_the_message_of_a_large_body_is_made_off_the_event_loop(served: Served, unnoticed_s: float, kind: str) -> None:
    path, small, more = TRANSLATED[kind]
    body = {**small, **more}

    def call(body: dict[str, Any]) -> None:
        assert served.server.http_port is not None
        connection = http.client.HTTPConnection("127.0.0.1", served.server.http_port)
        connection.request("POST", path, json.dumps(body))
        connection.getresponse().read()
        connection.close()

    call(body)
    small_s = served.longest_turn_s(lambda: call(small))
    large_s = served.longest_turn_s(lambda: call(body))
    assert large_s < small_s + unnoticed_s


@pytest.mark.parametrize("kind", BODIES)
def test_a_large_body_holds_up_the_event_loop_little_longer_than_a_small_one(
    served: Served, unnoticed_s: float, kind: str
) -> None:
    def call(fields: dict[str, Any]) -> None:
        assert served.server.http_port is not None
        connection = http.client.HTTPConnection("127.0.0.1", served.server.http_port)
        connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT, **fields}))
        connection.getresponse().read()
        connection.close()

    call(BODIES[kind])
    small_s = served.longest_turn_s(lambda: call({}))
    assert served.longest_turn_s(lambda: call(BODIES[kind])) < small_s + unnoticed_s
