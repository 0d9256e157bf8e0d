"""The pause before all servers of a client are tried again: how often there is one, and what ends it early."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2

from mpt_grpc_client import AsyncClient, Client, MptGrpcError
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from tools.relay import relaying


@pytest.fixture
def busy(service, other_service):
    """Two servers that ask callers to wait for an hour."""
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromSeconds(3600)
    for one in (service, other_service):
        one.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", "OVERLOADED", retry)
    return service, other_service


async def both_refused(busy):
    while not all(one.requests for one in busy):  # noqa: ASYNC110  (the services run in threads)
        await asyncio.sleep(0)


async def test_cancelling_a_stream_in_a_thread_ends_its_pause(busy, target, other_target):
    with Client([target, other_target]) as client:
        stream = client.stream("Once")
        reading = asyncio.create_task(asyncio.to_thread(list, stream))
        await both_refused(busy)
        stream.cancel()
        assert await reading == []


async def test_cancelling_an_async_stream_ends_its_pause(busy, target, other_target):
    async with AsyncClient([target, other_target]) as client:
        stream = client.stream("Once")

        async def read() -> list[str]:
            return [text async for text in stream]

        reading = asyncio.create_task(read())
        await both_refused(busy)
        stream.cancel()
        assert await reading == []


@pytest.mark.parametrize("call", ["generate", "stream", "get_model_info"])
async def test_closing_a_client_ends_the_pauses_of_threads(busy, target, other_target, call):
    client = Client([target, other_target])
    calls = {
        "generate": lambda: client.generate("Once"),
        "stream": lambda: list(client.stream("Once")),
        "get_model_info": client.get_model_info,
    }
    calling = asyncio.create_task(asyncio.to_thread(calls[call]))
    await both_refused(busy)
    client.close()
    with pytest.raises(MptGrpcError, match="the client is closed"):
        await calling


@pytest.mark.parametrize("call", ["generate", "stream", "get_model_info"])
async def test_closing_an_async_client_ends_the_pauses_of_tasks(busy, target, other_target, call):
    client = AsyncClient([target, other_target])
    calls = {
        "generate": lambda: client.generate("Once"),
        "stream": lambda: anext(client.stream("Once")),
        "get_model_info": client.get_model_info,
    }
    calling = asyncio.ensure_future(calls[call]())
    await both_refused(busy)
    await client.close()
    with pytest.raises(MptGrpcError, match="the client is closed"):
        await calling


@pytest.mark.parametrize("is_async", [True, False], ids=["asyncio", "threads"])
async def test_a_stream_that_has_begun_waits_until_another_server_is_no_longer_busy(
    scripted, other_service, target, other_target, is_async
):
    rest = pb.StreamGenerateResponse(request_id="r-1", output=scripted.response.outputs[0], fingerprint="same")
    rest.summary.CopyFrom(scripted.response.summary)
    other_service.chunks = [rest]
    other_service.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", "OVERLOADED", times=4)
    scripted.chunks[0].fingerprint = "same"
    del scripted.chunks[2:]
    scripted.hang()
    async with relaying(target) as relay:
        targets = [relay.target, other_target]
        if is_async:
            async with AsyncClient(targets, timeout=30) as async_client:
                stream = async_client.stream("Once")
                await anext(stream)
                relay.cut()
                async for _ in stream:
                    pass
        else:
            with Client(targets, timeout=30) as client:
                stream = client.stream("Once")
                await asyncio.to_thread(next, stream)
                relay.cut()
                await asyncio.to_thread(list, stream)
    assert len(other_service.requests) == 5
    assert [resumption.target for resumption in stream.resumptions] == [other_target]
