"""The connections of an `AsyncClient`, which belong to one event loop of one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import ClassVar

import grpc

from mpt_grpc_client.async_stream import AsyncConnection
from mpt_grpc_client.channel import Endpoint, is_balanced
from mpt_grpc_client.errors import closed_error
from mpt_grpc_client.purpose import Purpose
from mpt_grpc_client.rotation import Rotation, Server


class AsyncConnections:
    """The connections to the servers, which several clients of one event loop may share."""

    _process: ClassVar[int | None] = None
    """The ID of the process that uses grpc.aio, which would wait forever in a fork of it."""

    def __init__(self, endpoints: Sequence[Endpoint], retries: bool, channel: grpc.aio.Channel | None) -> None:
        self.is_balanced = is_balanced(endpoints, channel)
        self.endpoints, self._channel = endpoints, channel
        self._purpose = Purpose.of_calls(balanced=self.is_balanced, retries=retries)
        self._rotation: Rotation[AsyncConnection] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    @property
    def rotation(self) -> Rotation[AsyncConnection]:
        """The servers. Raises MptGrpcError once the client is closed, and RuntimeError outside its event loop."""
        self.check_open()
        self._check_process()
        loop = asyncio.get_running_loop()
        if self._rotation is None:
            # Made now: grpc.aio hangs if a channel is created before its loop runs.
            self._rotation, self._loop = (
                Rotation(map(self._server, self.endpoints), is_balanced=self.is_balanced),
                loop,
            )
        if self._loop is not loop:
            raise RuntimeError(
                "this AsyncClient is in use by another event loop; create one client for each event loop"
            )
        return self._rotation

    @classmethod
    def _check_process(cls) -> None:
        if cls._process is None:
            cls._process = os.getpid()
        elif cls._process != os.getpid():
            raise RuntimeError(
                "an AsyncClient was used before this process was forked, and gRPC's asyncio API does not work after;"
                " use Client, or start processes with multiprocessing's method 'spawn' or 'forkserver'"
            )

    def check_open(self) -> None:
        """Raises MptGrpcError once the client is closed."""
        if self._is_closed:
            raise closed_error()

    async def close(self) -> None:
        self._is_closed = True
        channels = [self._channel]
        if self._rotation is not None:
            self._rotation.close()
            channels = [server.connection.channel for server in self._rotation.servers]
        await asyncio.gather(*(channel.close() for channel in channels if channel is not None))

    def _server(self, endpoint: Endpoint) -> Server[AsyncConnection]:
        channel = self._channel or endpoint.aio_channel(self._purpose)
        return Server(endpoint.target, AsyncConnection(channel))
