"""A server of gRPC that a call has ended, and its replacement."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import http2
import pytest

from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

PATH = "/mpt.v1.TextGenerationService/Generate"
NOT_UTF_8 = PATH.replace("Generate", "\x80enerate").encode("latin-1")


@asynccontextmanager
async def calling_a_path_that_is_not_utf_8(target: str) -> AsyncIterator[None]:
    """Calls a method whose name grpc.aio cannot decode, and leaves after the block."""
    host, _, port = target.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(http2.PREFACE + http2.settings() + http2.call(PATH, b"").replace(PATH.encode(), NOT_UTF_8))
    try:
        yield
    finally:
        writer.close()


async def test_a_call_with_a_path_that_is_not_utf_8_stops_neither_the_server_nor_a_stream(
    make_service: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "mpt_grpc")
    service = await make_service()
    stopping = pb.StoppingCriteria(max_new_tokens=1500, ignore_eos=True)
    stream = service.stub.StreamGenerate(pb.GenerateRequest(text="The fox", stopping=stopping))
    chunks = aiter(stream)
    await anext(chunks)
    for number in (1, 2):
        async with calling_a_path_that_is_not_utf_8(service.server.target):
            while caplog.text.count("is replaced") < number:
                with suppress(grpc.aio.AioRpcError):
                    await service.stub.GetServerInfo(pb.GetServerInfoRequest())
            # The channel connects again, as those of all clients do.
            request = pb.GenerateRequest(text="Once", stopping=pb.StoppingCriteria(max_new_tokens=1))
            await service.stub.Generate(request, wait_for_ready=True, timeout=60)
    finish = [chunk.output.finish.reason async for chunk in chunks][-1]
    assert finish == pb.FINISH_REASON_MAX_NEW_TOKENS
