"""TLS over gRPC and HTTP: certificates of the server and of clients, and their replacement while the server runs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from access_tokens import entry, write
from certificates import Authority
from conftest import demo_settings

from mpt_grpc.errors import SettingsError
from mpt_grpc.gateway.serve import running_gateway
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings, TlsSettings
from mpt_grpc.tls import server_certificate
from mpt_grpc_client import AsyncClient, Client, UnavailableError
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

OPTIONS: Any = {"max_new_tokens": 3, "temperature": 0}
Serve = Callable[[TlsSettings], AbstractAsyncContextManager[RunningServer]]


@asynccontextmanager
async def serving(tls: TlsSettings) -> AsyncIterator[RunningServer]:
    settings = demo_settings(64)
    server = replace(settings.server, tls=tls)
    async with running_server(replace(settings, server=server, http=HttpSettings(port=0))) as running:
        yield running


async def over_grpc(target: str, **connection: Any) -> str:
    """Returns what a new connection generates."""
    channel_option = [("grpc.use_local_subchannel_pool", 1)]  # otherwise a channel to the same address shares it
    credentials = grpc.ssl_channel_credentials(
        connection.get("root_certificates"), connection.get("client_key"), connection.get("client_certificate")
    )
    channel = grpc.aio.secure_channel(target.removeprefix("grpcs://"), credentials, channel_option)
    async with AsyncClient(target, channel=channel, timeout=20) as client:
        return (await client.generate("The fox", **OPTIONS)).text


async def over_http(port: int | None, context: ssl.SSLContext, host: str = "localhost") -> str:
    """Returns what a new connection generates."""
    body = json.dumps({"prompt": "The fox", "max_tokens": 3, "temperature": 0}).encode()

    def post() -> str:
        with urllib.request.urlopen(f"https://{host}:{port}/v1/completions", body, 60, context=context) as response:
            return json.load(response)["choices"][0]["text"]

    return await asyncio.to_thread(post)


async def test_both_clients_reach_a_server_with_tls_and_without_it_nobody_does(tmp_path: Path) -> None:
    authority = Authority.new()
    async with serving(authority.write_server(tmp_path)) as server:
        target = server.target
        assert target.startswith("grpcs://127.0.0.1:")
        address = target.removeprefix("grpcs://")
        async with AsyncClient(target, root_certificates=authority.pem) as client:
            text = (await client.generate("The fox", **OPTIONS)).text
            assert (await client.get_server_info()).limits.max_running_requests == 64
        with Client(address, tls=True, root_certificates=authority.pem) as client:
            assert (await asyncio.to_thread(client.generate, "The fox", **OPTIONS)).text == text
        credentials = grpc.ssl_channel_credentials(authority.pem)
        with Client(address, credentials=credentials) as client:
            assert (await asyncio.to_thread(client.generate, "The fox", **OPTIONS)).text == text
        context = authority.context(tmp_path)
        assert await over_http(server.http_port, context) == text
        assert await over_http(server.http_port, context, "127.0.0.1") == text  # without a name in the handshake

        with pytest.raises(UnavailableError, match=r"closed the connection at once; check .* whether it requires TLS"):
            async with AsyncClient(address, retries=False, timeout=20) as client:
                await client.generate("The fox", **OPTIONS)
        with pytest.raises(
            UnavailableError, match=r"^TLS with 127\.0\.0\.1:\d+ failed; check the certificates of both"
        ):
            async with AsyncClient(target, root_certificates=Authority.new().pem, retries=False, timeout=20) as client:
                await client.generate("The fox", **OPTIONS)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
async def test_tls_1_2_is_accepted_and_tls_1_1_is_not(tmp_path: Path) -> None:
    authority = Authority.new()
    context = authority.context(tmp_path)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # offers old versions
    async with serving(authority.write_server(tmp_path)) as server:
        for port in (server.http_port, server.target.rpartition(":")[2]):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            writer.close()
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection("127.0.0.1", port, ssl=context)


async def test_a_new_certificate_is_presented_without_a_restart_and_a_broken_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "mpt_grpc")
    old, new = Authority.new(), Authority.new()
    tls = old.write_server(tmp_path)
    async with serving(tls) as server:
        async with AsyncClient(server.target, root_certificates=old.pem) as connected:
            text = (await connected.generate("The fox", **OPTIONS)).text
            new.write_server(tmp_path)
            caplog.clear()  # the certificate may have been read before its key was written
            assert await over_grpc(server.target, root_certificates=new.pem) == text
            assert await over_http(server.http_port, new.context(tmp_path)) == text
            with pytest.raises(UnavailableError):
                await over_grpc(server.target, root_certificates=old.pem)
            with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
                await over_http(server.http_port, old.context(tmp_path))
            assert (await connected.generate("The fox", **OPTIONS)).text == text  # the connection stays

            tls.certificate.write_text("no certificate")
            for _ in range(2):
                assert await over_grpc(server.target, root_certificates=new.pem) == text
                assert await over_http(server.http_port, new.context(tmp_path)) == text
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"--tls-cert, --tls-key: {tls.certificate} and ")
    assert line.endswith("the previous content stays in effect")


async def test_a_secret_of_kubernetes_that_changes_is_used_without_a_restart(tmp_path: Path) -> None:
    """Its files are links into the folder `..data`, which is a link itself, and the only one that is replaced."""
    authorities = {"old": Authority.new(), "new": Authority.new()}
    for name, authority in authorities.items():
        (tmp_path / name).mkdir()
        files = authority.write_server(tmp_path / name)
        write(tmp_path / name / "tokens.toml", entry(f"token-{name}", name))
    data = tmp_path / "..data"
    data.symlink_to("old")
    for name in ("server.pem", "server.key", "tokens.toml"):
        (tmp_path / name).symlink_to(Path("..data") / name)
    settings = demo_settings(64)
    server = replace(
        settings.server,
        tls=TlsSettings(tmp_path / files.certificate.name, tmp_path / files.key.name),
        tokens_file=tmp_path / "tokens.toml",
    )
    async with running_server(replace(settings, server=server, http=HttpSettings(port=0))) as running:
        for name, other in (("old", "new"), ("new", "old")):
            if name == "new":
                moved = tmp_path / "..data_tmp"
                moved.symlink_to("new")
                moved.replace(data)
            pem, context = authorities[name].pem, authorities[name].context(tmp_path)
            while not await is_accepted(running, f"token-{name}", pem):  # tokens are read again every second
                pass
            assert not await is_accepted(running, f"token-{other}", pem)
            await asyncio.to_thread(models, running.http_port, f"token-{name}", context)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                await asyncio.to_thread(models, running.http_port, f"token-{other}", context)


async def is_accepted(server: RunningServer, token: str, pem: bytes) -> bool:
    """Returns whether a new connection is served with this token."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    address = server.target.removeprefix("grpcs://")
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(pem), options) as channel:
        stub: Any = TextGenerationServiceStub(channel)
        try:
            await stub.GetModelInfo(
                pb.GetModelInfoRequest(), metadata=(("authorization", f"Bearer {token}"),), timeout=20
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise
            return False
        return True


def models(port: int | None, token: str, context: ssl.SSLContext) -> bytes:
    """Returns the models over a new connection."""
    request = urllib.request.Request(
        f"https://localhost:{port}/v1/models", headers={"authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=60, context=context) as response:
        return bytes(response.read())


async def test_only_clients_with_a_certificate_of_the_current_authority_are_served(tmp_path: Path) -> None:
    authority, old, new = Authority.new(), Authority.new(), Authority.new()
    mine, other = old.client("me.example.org"), new.client("you.example.org")
    async with serving(authority.write_server(tmp_path, client_ca=old)) as server:
        async with AsyncClient(server.target, root_certificates=authority.pem, **mine) as client:
            text = (await client.generate("The fox", **OPTIONS)).text
        assert await over_http(server.http_port, authority.context(tmp_path, mine)) == text

        for refused in ({}, other):
            with pytest.raises(UnavailableError):
                await over_grpc(server.target, root_certificates=authority.pem, **refused)
            with pytest.raises(OSError, match=r"alert|closed|reset|EOF|pipe"):
                await over_http(server.http_port, authority.context(tmp_path, refused or None))

        authority.write_server(tmp_path, client_ca=new)
        assert await over_grpc(server.target, root_certificates=authority.pem, **other) == text
        assert await over_http(server.http_port, authority.context(tmp_path, other)) == text
        with pytest.raises(UnavailableError):
            await over_grpc(server.target, root_certificates=authority.pem, **mine)
        with pytest.raises(OSError, match=r"alert|closed|reset|EOF|pipe"):
            await over_http(server.http_port, authority.context(tmp_path, mine))


async def test_an_expired_certificate_is_refused_by_clients(tmp_path: Path) -> None:
    authority = Authority.new()
    async with serving(authority.write_server(tmp_path, not_after=datetime(2020, 1, 1, tzinfo=UTC))) as server:
        with pytest.raises(UnavailableError, match="expired"):
            await over_grpc(server.target, root_certificates=authority.pem)
        with pytest.raises(urllib.error.URLError, match="expired"):
            await over_http(server.http_port, authority.context(tmp_path))


async def test_a_gateway_of_its_own_reaches_a_server_that_requires_certificates(tmp_path: Path) -> None:
    authority, clients, gateway_authority = Authority.new(), Authority.new(), Authority.new()
    (tmp_path / "gateway").mkdir()
    certificate = server_certificate(gateway_authority.write_server(tmp_path / "gateway"))
    mine = clients.client("gateway.example.org")
    async with serving(authority.write_server(tmp_path, client_ca=clients)) as server:
        connection = {"root_certificates": authority.pem, **mine}
        async with running_gateway(
            server.target, "127.0.0.1", HttpSettings(port=0), certificate=certificate, **connection
        ) as port:
            context = gateway_authority.context(tmp_path)
            text = await over_http(port, context)
            assert text == await over_http(server.http_port, authority.context(tmp_path, mine))
            body = json.dumps({"prompt": "The fox"}).encode()

            def count() -> int:
                with urllib.request.urlopen(
                    f"https://localhost:{port}/tokenize", body, 60, context=context
                ) as response:
                    return json.load(response)["count"]

            assert await asyncio.to_thread(count) == 2


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("server.pem", None, "--tls-cert: cannot read .*server.pem: No such file or directory"),
        ("server.key", None, "--tls-key: cannot read .*server.key: No such file or directory"),
        ("clients.pem", None, "--tls-client-ca: cannot read .*clients.pem: No such file or directory"),
        ("server.key", "x", "--tls-cert, --tls-key: .* are not a certificate and its unencrypted key, in PEM"),
        ("clients.pem", "x", "--tls-client-ca: .*clients.pem contains no certificates in PEM"),
    ],
)
async def test_files_that_cannot_be_used_end_the_start(
    file: str, content: str | None, error: str, tmp_path: Path
) -> None:
    authority = Authority.new()
    tls = authority.write_server(tmp_path, client_ca=authority)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(SettingsError, match=f"^{error}$"):
        async with serving(tls):
            pass


@pytest.mark.parametrize(
    ("file", "flag"), [("server.pem", "--tls-cert"), ("server.key", "--tls-key"), ("clients.pem", "--tls-client-ca")]
)
def test_a_pipe_ends_the_start_and_leaves_the_certificate_later(file: str, flag: str, tmp_path: Path) -> None:
    authority, pipe = Authority.new(), tmp_path / "pipe"
    os.mkfifo(pipe)
    certificate = server_certificate(tls := authority.write_server(tmp_path, client_ca=authority))
    old = certificate.value
    pipe.replace(tmp_path / file)
    assert certificate.refresh() is old
    with pytest.raises(SettingsError, match=f"^{flag}: {tmp_path / file} is not a regular file$"):
        server_certificate(tls)


async def test_a_certificate_with_the_key_of_another_ends_the_start(tmp_path: Path) -> None:
    authority = Authority.new()
    tls = authority.write_server(tmp_path)
    authority.ca.issue_cert("localhost").private_key_pem.write_to_path(tls.key)
    with pytest.raises(SettingsError, match="--tls-cert, --tls-key: "):
        async with serving(tls):
            pass
