"""A real server in this process, on a free port, and channels to it: over a connection, or local."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from conftest import demo_settings

from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import Settings
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub


@dataclass(frozen=True)
class Service:
    """A server and a channel to it."""

    server: RunningServer
    channel: grpc.aio.Channel
    stub: Any
    """A TextGenerationServiceStub on a grpc.aio channel, for which there is no separate type."""

    async def all_blocks_free(self) -> bool:
        """Returns whether no block is in use, after another request has run so that earlier ones have ended."""
        await self.stub.Generate(pb.GenerateRequest(text="x", stopping=pb.StoppingCriteria(max_new_tokens=1)))
        info = await self.stub.GetServerInfo(pb.GetServerInfoRequest())
        return info.load.num_free_blocks == info.load.num_blocks and self.server.engine.num_in_flight == 0


MakeService = Callable[..., Any]


@pytest.fixture
def is_local() -> bool:
    """Whether the tests use the server's local channel. Modules that override it test both kinds of channels."""
    return False


@pytest.fixture
async def make_service(is_local: bool) -> AsyncIterator[MakeService]:
    async with AsyncExitStack() as stack:

        async def make(settings: Settings | None = None, options: Any = (), **changes: Any) -> Service:
            server = await stack.enter_async_context(running_server(settings or demo_settings(**changes)))
            channel = server.channel
            if not is_local:
                channel = await stack.enter_async_context(
                    grpc.aio.insecure_channel(server.target, options=[("grpc.enable_retries", 0), *options])
                )
            return Service(server, channel, TextGenerationServiceStub(channel))

        yield make


@pytest.fixture(scope="session")
async def shared_service() -> AsyncIterator[Service]:
    async with running_server(demo_settings()) as server:
        async with grpc.aio.insecure_channel(server.target) as channel:
            yield Service(server, channel, TextGenerationServiceStub(channel))


@pytest.fixture
async def service(shared_service: Service, is_local: bool) -> Service:
    """A shared server, for tests that leave no state behind."""
    if not is_local:
        return shared_service
    channel = shared_service.server.channel
    return Service(shared_service.server, channel, TextGenerationServiceStub(channel))
