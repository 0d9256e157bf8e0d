"""Streams that their callers keep open and do not read, over gRPC and over HTTP."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import pytest
import uvicorn
from conftest import demo_settings
from google.rpc import error_details_pb2, status_pb2

from mpt_grpc.gateway.protocol import BoundedProtocol
from mpt_grpc.settings import Settings
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

MANY_TOKENS = 400


def settings() -> Settings:
    demo = demo_settings()
    return replace(demo, server=replace(demo.server, read_timeout_s=0.3))


def many_logprobs() -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="Once upon a time",
        stopping=pb.StoppingCriteria(max_new_tokens=MANY_TOKENS, ignore_eos=True),
        output_options=pb.OutputOptions(return_logprobs=True, top_logprobs=20),
    )


async def test_a_stream_that_is_not_read_frees_its_handler_and_says_so_when_it_is_read(
    make_service: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mpt_grpc.access")
    # A small HTTP/2 window, which the log probabilities fill.
    service = await make_service(settings(), [("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0)])
    unread = service.stub.StreamGenerate(many_logprobs())
    await anext(aiter(unread))

    await service.server.drain()  # waits for all handlers, for much longer than the test may take

    assert "StreamGenerate ABORTED" in caplog.text
    with pytest.raises(grpc.aio.AioRpcError, match="nothing could be sent") as caught:
        async for _ in unread:
            pass
    assert caught.value.code() is grpc.StatusCode.ABORTED
    packed = next(value for key, value in caught.value.trailing_metadata() if key == "grpc-status-details-bin")
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(packed).details[0].Unpack(info)
    assert info.reason == "NOT_READ"


async def test_an_http_connection_that_is_not_read_is_closed() -> None:
    is_disconnected = asyncio.Event()

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        writing = asyncio.create_task(write_forever(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        writing.cancel()
        is_disconnected.set()

    config = uvicorn.Config(app, http=partial(BoundedProtocol, read_timeout_s=0.1), lifespan="off", log_config=None)
    config.load()
    state = uvicorn.server.ServerState()
    make_protocol = partial(config.http_protocol_class, config=config, server_state=state, app_state={})
    async with await asyncio.get_running_loop().create_server(make_protocol, "127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        await is_disconnected.wait()
        writer.close()


async def write_forever(send: Any) -> None:
    while True:
        await send({"type": "http.response.body", "body": b"a" * 65536, "more_body": True})
