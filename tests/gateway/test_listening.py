"""The addresses that the HTTP port listens on are those of the gRPC port."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from typing import Any

import pytest
import uvicorn
from conftest import demo_settings

from mpt_grpc.errors import SettingsError
from mpt_grpc.gateway.serve import running_gateway
from mpt_grpc.server.server import running_server
from mpt_grpc.settings import HttpSettings, ServerSettings

LOOPBACK = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


def families(port: int) -> list[str]:
    """Returns the loopback addresses at which the port accepts connections."""
    accepting = []
    for family, address in LOOPBACK:
        with socket.socket(family) as client:
            if client.connect_ex((address, port)) == 0:
                accepting.append(address)
    return accepting


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "::"])
async def test_both_ports_listen_on_the_same_addresses(host: str) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    settings = replace(demo_settings(), server=ServerSettings(host=host, grpc_port=0), http=HttpSettings(port=0))
    async with running_server(settings) as server:
        assert server.http_port is not None
        assert families(server.http_port) == families(int(server.target.rpartition(":")[2])) != []


@pytest.mark.parametrize(
    ("host", "error"),
    [
        ("no.such.host.invalid", "--host: cannot listen on no.such.host.invalid:0: "),
        ("203.0.113.1", "--host: cannot listen on 203.0.113.1:0: "),
    ],
)
async def test_a_host_that_cannot_be_listened_on_is_named(host: str, error: str) -> None:
    with pytest.raises(SettingsError, match=error.replace(".", r"\.")):
        async with running_gateway("localhost:1", host, HttpSettings(port=0)):
            pass


async def test_a_port_in_use_is_named() -> None:
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        with pytest.raises(SettingsError, match=r"--http-port: cannot listen .* --http-port 0 selects a free one"):
            async with running_gateway("localhost:1", "127.0.0.1", HttpSettings(port=used.getsockname()[1])):
                pass


async def test_a_gateway_that_fails_to_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def startup(*_: Any) -> None:
        raise OSError("no more open files")

    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    async with asyncio.timeout(10):
        with pytest.raises(OSError, match="no more open files"):
            async with running_gateway("localhost:1", "127.0.0.1", HttpSettings(port=0)):
                pass
