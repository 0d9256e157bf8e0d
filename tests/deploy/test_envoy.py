"""Three servers behind Envoy with the settings in deploy/, and behind the client without it."""

from __future__ import annotations

import asyncio
import json
from asyncio.subprocess import PIPE, create_subprocess_exec
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
import yaml
from conftest import demo_settings
from programs import DEPLOY, output_of, program

from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc_client import AsyncClient
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub
from tools.relay import Relay, relaying

SETTINGS = DEPLOY / "envoy/envoy.yaml"
PROMPT = "Once upon a time there was a fox"


class Cluster:
    """Three servers, each behind a relay that can cut it off."""

    def __init__(self, servers: list[RunningServer], relays: list[Relay]) -> None:
        self.servers, self.relays = servers, relays

    def busy(self) -> list[int]:
        """Returns the indexes of the servers that have requests."""
        return [index for index, server in enumerate(self.servers) if server.engine.num_in_flight]


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(running_server(demo_settings())) for _ in range(3)]
        yield Cluster(servers, [await stack.enter_async_context(relaying(server.target)) for server in servers])


@asynccontextmanager
async def envoy(cluster: Cluster, folder: Path) -> AsyncIterator[int]:
    """Runs Envoy in front of the servers, with nothing but addresses changed, and yields its port."""
    settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    (listener,), (upstream,) = (settings["static_resources"][name] for name in ("listeners", "clusters"))
    settings["admin"]["address"]["socket_address"]["port_value"] = 0
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": 0}
    (endpoints,) = upstream["load_assignment"]["endpoints"]
    endpoints["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": relay.port}}}}
        for relay in cluster.relays
    ]
    (folder / "envoy.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    address = folder / "admin"
    flags = (
        "-c",
        folder / "envoy.yaml",
        "--admin-address-path",
        address,
        "--use-dynamic-base-id",
        "--concurrency",
        "1",
    )
    process = await create_subprocess_exec(program("envoy"), *flags, stderr=PIPE)
    assert process.stderr is not None
    try:
        await process.stderr.readuntil(b"starting workers")  # after the first check of each server's health
        reading = asyncio.create_task(process.stderr.read())
        url = f"http://{address.read_text(encoding='utf-8')}/listeners?format=json"
        (status,) = json.loads(await asyncio.to_thread(lambda: urlopen(url, timeout=10).read()))["listener_statuses"]
        yield status["local_address"]["socket_address"]["port_value"]
    finally:
        process.kill()
        await process.wait()
    await reading


def request(max_new_tokens: int) -> pb.GenerateRequest:
    stopping = pb.StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True)
    return pb.GenerateRequest(text=PROMPT, stopping=stopping)


def test_envoy_accepts_the_settings() -> None:
    assert "OK" in output_of(program("envoy"), "--mode", "validate", "-c", SETTINGS, "--use-dynamic-base-id")


async def begun(stream: Any) -> AsyncIterator[Any]:
    """Reads the first message of a stream, and returns the others."""
    messages = aiter(stream)
    await anext(messages)
    return messages


async def read(messages: AsyncIterator[Any]) -> None:
    """Reads a stream to its end."""
    async for _ in messages:
        pass


async def test_streams_are_spread_and_those_that_break_are_not_sent_again(cluster: Cluster, tmp_path: Path) -> None:
    async with envoy(cluster, tmp_path) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = TextGenerationServiceStub(channel)
        streams, readers = [], set()
        while cluster.busy() != [0, 1, 2]:
            streams.append(stub.StreamGenerate(request(1500)))
            readers.add(asyncio.create_task(read(await begun(streams[-1]))))
        num_broken = cluster.servers[0].engine.num_in_flight
        cluster.relays[0].cut()
        ended: set[asyncio.Task[None]] = set()
        while len(ended) < num_broken:
            now, _ = await asyncio.wait(readers - ended, return_when=asyncio.FIRST_COMPLETED)
            ended |= now
        for reader in ended:
            with pytest.raises(grpc.aio.AioRpcError, match="RST_STREAM"):
                await reader
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def test_the_client_continues_a_stream_through_envoy(cluster: Cluster, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 200, "ignore_eos": True, "seed": 5}
    async with envoy(cluster, tmp_path) as port, AsyncClient(f"dns:///localhost:{port}", timeout=60) as client:
        whole = await client.generate(PROMPT, **options)
        stream = client.stream(PROMPT, **options)
        await anext(stream)
        (busy,) = cluster.busy()
        cluster.relays[busy].cut()
        await read(stream)
    assert len(stream.resumptions) == 1
    assert stream.result.text == whole.text


async def test_a_server_that_drains_finishes_its_streams_and_gets_no_new_calls(
    cluster: Cluster, tmp_path: Path
) -> None:
    async with envoy(cluster, tmp_path) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = TextGenerationServiceStub(channel)
        stream = stub.StreamGenerate(request(500))
        messages = await begun(stream)
        (busy,) = cluster.busy()
        draining = asyncio.create_task(cluster.servers[busy].drain())
        async with AsyncClient(f"dns:///localhost:{port}", timeout=60) as client:
            for _ in range(6):
                assert (await stub.Generate(request(2))).outputs[0].text
                assert (await client.generate(PROMPT, max_new_tokens=2)).text
        await read(messages)
        assert await stream.code() is grpc.StatusCode.OK
        await draining


async def test_without_envoy_the_client_spreads_streams_and_continues_those_that_break(cluster: Cluster) -> None:
    options: dict[str, Any] = {"max_new_tokens": 250, "ignore_eos": True, "seed": 5}
    async with AsyncClient([relay.target for relay in cluster.relays], timeout=60) as client:
        whole = await client.generate(PROMPT, **options)
        streams = [client.stream(PROMPT, **options) for _ in range(6)]
        for stream in streams:
            await anext(stream)
        assert [server.engine.num_in_flight for server in cluster.servers] == [2, 2, 2]
        cluster.relays[0].cut()
        await asyncio.gather(*map(read, streams))
    assert [stream.result.text for stream in streams] == [whole.text] * 6
    assert sorted(len(stream.resumptions) for stream in streams) == [0, 0, 0, 0, 1, 1]
