"""Channelz on its own port: what gRPC knows of its connections and their calls, for programs on this machine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_reflection.v1alpha import reflection

from mpt_grpc.server.ports import bind

HOST = "127.0.0.1"
"""Channelz knows no access tokens, and shows the addresses of all callers."""
_SERVICE = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name


@asynccontextmanager
async def serving_channelz(port: int) -> AsyncIterator[tuple[grpc.aio.Server, int]]:
    """Serves channelz inside the block; yields the server and its port. Raises SettingsError if it cannot listen."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    channelz.add_channelz_servicer(server)
    reflection.enable_server_reflection((_SERVICE, reflection.SERVICE_NAME), server)
    bound = bind(server, HOST, port, "--channelz-port")
    await server.start()
    try:
        yield server, bound
    finally:
        await server.stop(0)
