"""`cancel` on several servers: one deadline for all of them, and each is asked."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
from collections.abc import Iterator

import pytest

from mpt_grpc_client import AsyncClient, Client, DeadlineExceededError, MptGrpcError, UnavailableError
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

UNUSED = "127.0.0.1:1"


@pytest.fixture(params=[Client, AsyncClient])
def kind(request: pytest.FixtureRequest) -> type[Client | AsyncClient]:
    return request.param


async def cancelled(client: Client | AsyncClient) -> tuple[str, ...]:
    """Cancels requests in this event loop, or in a thread."""
    result = client.cancel("a", "b") if isinstance(client, AsyncClient) else asyncio.to_thread(client.cancel, "a", "b")
    return await result


async def closed(client: Client | AsyncClient) -> None:
    if inspect.isawaitable(closing := client.close()):
        await closing


async def test_every_server_is_asked_although_one_hangs(kind, service, target, other_service, other_target):
    hang = service.hang()
    client = kind([target, other_target], timeout=1)
    with pytest.raises(DeadlineExceededError, match=r"^the client's timeout of 1 s has passed before the response$"):
        await cancelled(client)
    await closed(client)
    assert hang.reached.is_set()
    assert len(other_service.requests) == 1


async def test_the_ids_of_all_servers_are_returned_once(kind, service, target, other_service, other_target):
    service.cancelled = pb.CancelResponse(request_ids=["a"])
    other_service.cancelled = pb.CancelResponse(request_ids=["b", "a"])
    client = kind([target, UNUSED, other_target], timeout=30)
    assert set(await cancelled(client)) == {"a", "b"}
    await closed(client)


async def test_without_any_server_the_call_fails(kind):
    client = kind([UNUSED, "127.0.0.1:2"], timeout=30)
    with pytest.raises(UnavailableError, match="no server responds"):
        await cancelled(client)
    await closed(client)


@pytest.fixture
def slow_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A target whose name server does not respond."""
    responds, look_up = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host, *arguments, **options):
        if host == "slow.example":
            assert responds.wait(60)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield "dns:///slow.example:50051"
    responds.set()


async def test_a_name_that_is_not_found_in_time_keeps_no_server_from_being_asked(kind, service, target, slow_name):
    client = kind([slow_name, target], timeout=1)
    with pytest.raises(DeadlineExceededError, match="timeout of 1 s has passed before the addresses of a target"):
        await cancelled(client)
    await closed(client)
    assert len(service.requests) == 1


async def test_a_closed_client_asks_no_server(kind, service, target, slow_name):
    client = kind([slow_name, target])
    await closed(client)
    with pytest.raises(MptGrpcError, match="the client is closed"):
        await cancelled(client)
    assert not service.requests
