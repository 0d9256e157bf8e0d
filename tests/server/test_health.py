"""Health, which needs no access token, against callers who watch too much or do not read."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest
from conftest import demo_settings
from grpc_health.v1 import health_pb2, health_pb2_grpc
from http2 import PREFACE, call, settings

from mpt_grpc.errors import OverloadedError
from mpt_grpc.server.health import Health
from mpt_grpc.server.server import running_server

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
MAX_WATCHES = 1000


async def test_more_watches_than_the_server_holds_are_refused_with_a_remedy(make_service: Any) -> None:
    service = await make_service()
    stub: Any = health_pb2_grpc.HealthStub(service.channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(MAX_WATCHES)]
    assert {response.status for response in await asyncio.gather(*(watch.read() for watch in watches))} == {SERVING}

    more = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3000)]
    for refused in await asyncio.gather(*(watch.read() for watch in more), return_exceptions=True):
        assert isinstance(refused, grpc.aio.AioRpcError)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "call Check instead" in str(refused.details())
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING

    drain = asyncio.create_task(service.server.drain())
    changed = await asyncio.gather(*(watch.read() for watch in watches))
    assert {response.status for response in changed} == {NOT_SERVING}
    await drain
    for watch in watches:
        watch.cancel()
    while True:
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        try:
            assert (await watch.read()).status == NOT_SERVING
        except grpc.aio.AioRpcError:
            continue  # the server has not noticed the ends yet
        break


async def test_callers_of_one_machine_leave_watches_to_those_of_others() -> None:
    async with running_server(demo_settings()) as server, grpc.aio.insecure_channel(server.target) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(MAX_WATCHES)]
        await asyncio.gather(*(watch.read() for watch in watches))
        host, port = server.target.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, port, local_addr=("127.0.0.2", 0))
        writer.write(PREFACE + settings() + call("/grpc.health.v1.Health/Watch", b""))
        ends = [asyncio.ensure_future(watch.read()) for watch in watches]
        ((ended,), _) = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        error = ended.exception()
        assert isinstance(error, grpc.aio.AioRpcError)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        response = b""
        while b"\0\0\0\0\x02\x08\x01" not in response:  # the message SERVING
            response += await reader.read(4096)

        drain = asyncio.create_task(server.drain())
        ends.remove(ended)
        assert {response.status for response in await asyncio.gather(*ends)} == {NOT_SERVING}
        while b"\0\0\0\0\x02\x08\x02" not in response:  # NOT_SERVING
            response += await reader.read(4096)
        await drain
        writer.close()


class Call:
    """The context of a call from an address, as gRPC gives it to the service."""

    def __init__(self, address: str) -> None:
        self._peer = f"ipv6:%5B{address}%5D:50000"

    def peer(self) -> str:
        return self._peer

    async def abort(self, *_: Any, **__: Any) -> None:
        raise grpc.aio.AbortError


async def test_all_ipv6_addresses_of_a_network_are_one_host() -> None:
    health, request = Health(), health_pb2.HealthCheckRequest()
    health.set("", is_serving=True)
    watches = []

    async def watch(address: str) -> health_pb2.HealthCheckResponse:
        responses = health.Watch(request, cast(Any, Call(address)))
        watches.append(responses)
        return await anext(responses)

    for number in range(MAX_WATCHES):
        await watch(f"2001:db8::{number:x}")
    with pytest.raises(OverloadedError):
        await watch("2001:db8::1:0")
    for other in ("2001:db8:0:1::1", "fe80::1%254"):  # the second as gRPC writes the interface number 4
        assert (await watch(other)).status == SERVING
    for responses in watches:
        await responses.aclose()


async def test_a_watch_of_a_service_that_does_not_exist_says_so(make_service: Any) -> None:
    service = await make_service()
    stub: Any = health_pb2_grpc.HealthStub(service.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="other"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Check(health_pb2.HealthCheckRequest(service="other"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watch_that_is_not_read_holds_nothing_up() -> None:
    async with running_server(demo_settings()) as server:
        reader, writer = await asyncio.open_connection(*server.target.rsplit(":", 1))
        watch = call("/grpc.health.v1.Health/Watch", b"")
        writer.write(PREFACE + settings(INITIAL_WINDOW_SIZE=0) + watch)
        response = b""
        while b"application/grpc" not in response:  # then the server waits until it may send the message
            response += await reader.read(4096)
        await asyncio.wait_for(server.drain(), timeout=10)
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            assert (await stub.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
        writer.close()
