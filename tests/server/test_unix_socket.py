"""A server that listens on a Unix socket: who reaches it, what becomes of its file, and paths that are refused."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import demo_settings
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mpt_grpc.errors import ModelError, SettingsError
from mpt_grpc.server.server import running_server
from mpt_grpc.server.welcome import welcome
from mpt_grpc.settings import Settings
from mpt_grpc_client import AsyncClient, Client

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
OPTIONS: Any = {"max_new_tokens": 5, "temperature": 0}


def socket_settings(path: Path) -> Settings:
    settings = demo_settings(64)
    return replace(settings, server=replace(settings.server, grpc_socket=path))


@pytest.mark.parametrize("name", ["mpt.sock", "a b%20ü?.sock"])
async def test_all_clients_reach_a_socket_whatever_its_name_and_proxies_never_touch_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_service: Any
) -> None:
    for variable in PROXIES:
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    service = await make_service(socket_settings(tmp_path / name))
    target = service.server.target
    assert target.startswith(f"unix:{tmp_path}/")
    assert f"  gRPC      {target}" in welcome(service.server).splitlines()

    health = health_pb2_grpc.HealthStub(service.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    async with AsyncClient(target) as client:
        text = (await client.generate("The fox", **OPTIONS)).text
    with Client(target) as client:
        assert (await asyncio.to_thread(client.generate, "The fox", **OPTIONS)).text == text


async def test_the_file_has_the_permissions_of_the_umask_and_is_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "mpt.sock"
    umask = os.umask(0o027)
    try:
        async with running_server(socket_settings(path)):
            assert stat.S_IMODE(path.stat().st_mode) == 0o750
    finally:
        os.umask(umask)
    assert not path.exists()


async def test_the_file_is_removed_if_the_start_fails(tmp_path: Path) -> None:
    settings = socket_settings(tmp_path / "mpt.sock")
    with pytest.raises(ModelError):
        async with running_server(replace(settings, model=replace(settings.model, model="./missing"))):
            pass
    assert not os.listdir(tmp_path)


async def test_the_file_of_a_killed_server_is_replaced_and_that_of_a_running_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "mpt.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    async with running_server(socket_settings(path)) as server:
        with pytest.raises(SettingsError, match="the socket is in use; is another mpt-grpc running"):
            async with running_server(socket_settings(path)):
                pass
        async with AsyncClient(server.target) as client:
            assert await client.generate("The fox", **OPTIONS)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x" * 108, "the path has [0-9]+ bytes, above the system's limit of 107"),
        ("missing/mpt.sock", "there is no folder .*/missing"),
        ("file", "the file exists and is not a socket"),
        (".", "the file exists and is not a socket"),
    ],
)
async def test_a_path_that_cannot_be_a_socket_is_refused_with_the_reason(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SettingsError, match=f"^--grpc-socket: cannot listen on {tmp_path}.*: {why}$"):
        async with running_server(socket_settings(tmp_path / name)):
            pass
    assert (tmp_path / "file").read_text() == "kept"
