"""A TCP relay in front of a server, which breaks connections as a dying server or a network does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Relay:
    """Forwards connections to a server. It can break them at any byte, and then refuses new ones."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self.port = 0
        self.num_bytes = 0
        """The number of bytes from the server that were forwarded."""
        self.cut_after: int | None = None
        """The number of such bytes after which the server is cut off."""
        self.num_connections = 0
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def is_cut(self) -> bool:
        return self.cut_after is not None and self.num_bytes >= self.cut_after

    def cut(self) -> None:
        """Breaks all connections, and refuses new ones until `cut_after` is None again."""
        self.cut_after = self.num_bytes
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forwards one connection in both directions."""
        self.num_connections += 1
        if self.is_cut:
            writer.transport.abort()
            return
        with suppress(OSError):
            upstream_reader, upstream_writer = await asyncio.open_connection(self._host, self._port)
            self._writers |= {writer, upstream_writer}
            forwards = (
                asyncio.create_task(self._forward(reader, upstream_writer)),
                asyncio.create_task(self._forward(upstream_reader, writer, is_counted=True)),
            )
            await asyncio.wait(forwards, return_when=asyncio.FIRST_COMPLETED)
            for one in (writer, upstream_writer):
                one.transport.abort()
            await asyncio.gather(*forwards, return_exceptions=True)
            self._writers -= {writer, upstream_writer}

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_counted: bool = False
    ) -> None:
        while data := await reader.read(1 << 16):
            if is_counted:
                if self.cut_after is not None:
                    data = data[: max(0, self.cut_after - self.num_bytes)]
                self.num_bytes += len(data)
            writer.write(data)
            await writer.drain()
            if is_counted and self.is_cut:
                return


@asynccontextmanager
async def relaying(target: str, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Relay]:
    """Runs a relay to a server on a free port, or on the given one."""
    relay = Relay(target)
    server = await asyncio.start_server(relay.serve, host, port)
    relay.port = server.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        server.close()
        relay.cut()
