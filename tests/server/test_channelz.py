"""Channelz on its own port."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import http2
import pytest
from conftest import demo_settings
from grpc_channelz.v1 import channelz_pb2 as pb
from grpc_channelz.v1.channelz_pb2_grpc import ChannelzStub

from mpt_grpc.errors import SettingsError
from mpt_grpc.server.server import running_server
from mpt_grpc.settings import ServerSettings, TelemetrySettings
from mpt_grpc_client import AsyncClient


async def test_channelz_counts_the_calls_of_the_server_and_listens_on_this_machine_only() -> None:
    everywhere = replace(demo_settings(64), server=ServerSettings(host="0.0.0.0", grpc_port=0))
    settings = replace(everywhere, telemetry=TelemetrySettings(channelz_port=0))
    async with running_server(settings) as server, AsyncClient(server.target) as client:
        for _ in range(3):
            await client.get_model_info()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.channelz_port}") as channel:
            stub: Any = ChannelzStub(channel)
            servers = (await stub.GetServers(pb.GetServersRequest())).server
        assert max(one.data.calls_succeeded for one in servers) == 3
        taken = TelemetrySettings(channelz_port=server.channelz_port)
        with pytest.raises(SettingsError, match=rf"--channelz-port: cannot listen on 127.0.0.1:{server.channelz_port}"):
            async with running_server(replace(everywhere, telemetry=taken)):
                pass


async def test_the_end_of_the_server_of_channelz_is_a_failure_of_the_process() -> None:
    settings = replace(demo_settings(64), telemetry=TelemetrySettings(channelz_port=0))
    path = "/grpc.channelz.v1.Channelz/GetServers"
    call = http2.call(path, b"").replace(path.encode(), path.replace("GetServers", "\x80etServers").encode("latin-1"))
    async with running_server(settings) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.channelz_port)
        writer.write(http2.PREFACE + http2.settings() + call)
        await server.has_failed.wait()
        writer.close()
        assert str(server.failure).startswith("gRPC's server has ended: ")
