"""A name in DNS whose address changes."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from conftest import demo_settings

from mpt_grpc.server.server import running_server
from mpt_grpc_client import AsyncClient
from tools.relay import relaying

_HEADER_BYTES, _TYPE_AND_CLASS_BYTES, _TYPE_A = 12, 4, 1


class NameServer(asyncio.DatagramProtocol):
    """Answers each question of DNS with one address."""

    def __init__(self, address: str) -> None:
        self.address, self.port = address, 0

    def connection_made(self, transport: Any) -> None:
        self._transport, self.port = transport, transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        end = data.index(b"\0", _HEADER_BYTES) + 1 + _TYPE_AND_CLASS_BYTES
        is_found = struct.unpack_from(">H", data, end - _TYPE_AND_CLASS_BYTES)[0] == _TYPE_A
        header = data[:2] + struct.pack(">5H", 0x8580, 1, is_found, 0, 0)
        answer = struct.pack(">HHHIH", 0xC000 + _HEADER_BYTES, _TYPE_A, 1, 1, 4) + socket.inet_aton(self.address)
        self._transport.sendto(header + data[_HEADER_BYTES:end] + (answer if is_found else b""), addr)


@asynccontextmanager
async def name_server(address: str) -> AsyncIterator[NameServer]:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(lambda: NameServer(address), ("127.0.0.1", 0))
    try:
        yield server
    finally:
        transport.close()


async def test_a_stream_goes_on_at_the_new_address_of_a_name() -> None:
    async with (
        running_server(demo_settings()) as server,
        name_server("127.0.0.1") as names,
        relaying(server.target) as old,
        relaying(server.target, "127.0.0.2", old.port),
        AsyncClient(f"dns://127.0.0.1:{names.port}/mpt.test:{old.port}", timeout=60) as client,
    ):
        whole = await client.generate("Once", max_new_tokens=100, ignore_eos=True, seed=5)
        stream = client.stream("Once", max_new_tokens=100, ignore_eos=True, seed=5)
        pieces = [await anext(stream) for _ in range(5)]
        names.address = "127.0.0.2"
        old.cut()
        pieces += [piece async for piece in stream]
        assert "".join(pieces) == whole.text
        assert len(stream.resumptions) == 1
