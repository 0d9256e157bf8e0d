"""Callers who send as much as they can leave no memory behind."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

import grpc
from server_process import ServerProcess, running

from mpt_grpc.limits import MAX_BYTES, MAX_COUNTS, MAX_TEXT_CHARACTERS, MAX_TOKEN_IDS
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

NUM_CALLS = 10
MAX_GROWTH_BYTES = 100 << 20


def generate(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": "Once", **fields}, stopping=pb.StoppingCriteria(max_new_tokens=1))


def conversation(*contents: str) -> pb.GenerateRequest:
    turns = [pb.Message(role=pb.ROLE_USER, content=content) for content in contents]
    return pb.GenerateRequest(conversation=pb.Conversation(messages=turns))


def decoding(**fields: Any) -> pb.GenerateRequest:
    return generate(decoding=pb.DecodingOptions(**fields))


def stopping(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Once", stopping=pb.StoppingCriteria(max_new_tokens=1, **fields))


MESSAGES = {
    "a conversation of 9 MB": lambda: conversation("a " * 4_500_000),
    "a conversation of 5 MB": lambda: conversation("a " * 2_500_000),
    "a conversation of 1.9 MB": lambda: conversation("a " * 950_000),
    "2.8 million messages": lambda: conversation(*[""] * 1_400_000),
    "400,000 messages": lambda: conversation(*[""] * 400_000),
    "900,000 stop strings": lambda: stopping(stop_strings=[""] * 900_000),
    "900,000 stop tokens": lambda: stopping(stop_token_ids=[5] * 900_000),
    "900,000 options": lambda: decoding(choice=pb.Choice(options=[""] * 900_000)),
    "100,000 biases": lambda: decoding(logit_bias=dict.fromkeys(range(100_000), 1.0)),
    "1.8 million allowed tokens": lambda: decoding(allowed_token_ids=[5] * 1_800_000),
    "1.8 million resumed tokens": lambda: generate(resume_token_ids=[5] * 1_800_000),
    "1.8 million prompt tokens": lambda: pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 1_800_000)),
    "a schema of 1.8 MB": lambda: decoding(json_schema="[" * 1_800_000),
    "a nested schema": lambda: decoding(json_schema="[" * MAX_BYTES["decoding.json_schema"]),
    "a model's name of 1.8 MB": lambda: generate(model="m" * 1_800_000),
    "nested template arguments": lambda: pb.GenerateRequest(
        conversation=pb.Conversation(chat_template_kwargs="[" * MAX_BYTES["conversation.chat_template_kwargs"])
    ),
    "900,000 tools": lambda: pb.GenerateRequest(conversation=pb.Conversation(tools=[pb.Tool()] * 900_000)),
    "nested parameters of a tool": lambda: pb.GenerateRequest(
        conversation=pb.Conversation(tools=[pb.Tool(name="f", parameters="[" * (MAX_BYTES["conversation.tools"] - 9))])
    ),
    "nested arguments of a call": lambda: pb.GenerateRequest(
        conversation=pb.Conversation(
            messages=[
                pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=[pb.ToolCall(name="f", arguments='{"a":' * 50_000)]),
                pb.Message(role=pb.ROLE_USER, content="Hi"),
            ]
        )
    ),
    "the longest text": lambda: pb.GenerateRequest(
        text="a " * (MAX_TEXT_CHARACTERS // 2), truncate_prompt_tokens=5, stopping=pb.StoppingCriteria(max_new_tokens=1)
    ),
    "the most token IDs": lambda: pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5] * MAX_TOKEN_IDS),
        truncate_prompt_tokens=5,
        stopping=pb.StoppingCriteria(max_new_tokens=1),
    ),
    "the most messages": lambda: conversation(*["hello " * 100] * MAX_COUNTS["conversation.messages"]),
}
"""Messages of `Generate`, of which most are refused."""


LONG_TEXT = "a " * 1_900_000
BODIES: dict[str, tuple[str, Any]] = {
    "a long prompt": ("/v1/completions", {"prompt": LONG_TEXT}),
    "a body that is too long": ("/v1/completions", {"prompt": 3 * LONG_TEXT}),
    "a body that is not JSON": ("/v1/completions", LONG_TEXT),
    "many values": ("/v1/completions", {"prompt": [[1] * 1000] * 1000}),
    "many prompts": ("/v1/completions", {"prompt": ["a"] * 200_000}),
    "many token IDs": ("/v1/completions", {"prompt": [5] * 250_000}),
    "an unknown field": ("/v1/completions", {"prompt": "a", "x": LONG_TEXT}),
    "a long message": ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG_TEXT}]}),
    "many messages": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 50_000}),
    "many parts": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 60_000}]},
    ),
    "a long text to tokenize": ("/tokenize", {"prompt": LONG_TEXT}),
}


def resident_bytes(server: ServerProcess) -> int:
    with open(f"/proc/{server.pid}/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) << 10


def post(url: str, body: bytes) -> None:
    with suppress(urllib.error.HTTPError, ConnectionError, urllib.error.URLError):
        urllib.request.urlopen(urllib.request.Request(url, body), timeout=60).read()


def test_hostile_calls_of_every_kind_leave_no_memory_behind() -> None:
    with running() as server, grpc.insecure_channel(server.target, [("grpc.enable_retries", 0)]) as channel:
        stub: Any = TextGenerationServiceStub(channel)
        root = server.openai_url.removesuffix("/v1")
        stub.Generate(generate())
        post(f"{root}/v1/completions", b'{"prompt": "Once", "max_tokens": 1}')
        start = resident_bytes(server)
        for make in MESSAGES.values():
            message = make()
            for _ in range(NUM_CALLS):
                with suppress(grpc.RpcError):
                    stub.Generate(message)
        for path, fields in BODIES.values():
            body = json.dumps(fields).encode()
            for _ in range(NUM_CALLS):
                post(f"{root}{path}", body)
        end_s = time.monotonic() + 60  # within which an idle server returns free memory to the system
        while (growth := resident_bytes(server) - start) > MAX_GROWTH_BYTES and time.monotonic() < end_s:
            stub.Generate(generate())
        assert growth < MAX_GROWTH_BYTES


def test_pipelined_requests_take_little_memory_while_they_wait(server: ServerProcess) -> None:
    start = resident_bytes(server)
    with ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", urlsplit(server.openai_url).port)))
            for _ in range(30)
        ]
        for connection in connections:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 5000)
        for connection in connections:
            assert connection.recv(1)
        assert resident_bytes(server) - start < MAX_GROWTH_BYTES
