"""Websites cannot use a server on their visitor's machine, unless they are allowed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from conftest import demo_settings
from http_calls import read_response, send

from mpt_grpc.errors import SettingsError
from mpt_grpc.gateway.serve import running_gateway
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings

PATH, BODY = "/v1/completions", {"prompt": "a", "max_tokens": 1}
ALLOWED = HttpSettings(port=0, allow_hosts=("Chat.example",), allow_origins=("https://chat.example",))


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[RunningServer]:
    async with running_server(demo_settings()) as server:
        yield server


async def statuses(server: RunningServer, host: str, settings: HttpSettings, *requests: dict[str, str]) -> list[int]:
    """Returns the statuses of completions with these headers, by a gateway that listens on `host`."""
    async with running_gateway(server.target, host, settings) as server.http_port:
        return [(await read_response(*await send(server, "POST", PATH, BODY, **headers)))[0] for headers in requests]


async def test_only_names_of_this_machine_are_accepted_on_a_loopback_address(server: RunningServer) -> None:
    own = ["localhost", "LOCALHOST:8451", "127.0.0.1:1", "127.9.9.9", "[::1]:8451", socket.gethostname()]
    foreign = ["rebind.test", "rebind.test:8451", "localhost.rebind.test", "192.0.2.1", "[2001:db8::1]", "", "[::]"]
    requests = [{"host": host} for host in own + foreign]
    assert await statuses(server, "localhost", HttpSettings(port=0), *requests) == [200] * len(own) + [403] * len(
        foreign
    )
    assert await statuses(server, "0.0.0.0", HttpSettings(port=0), *requests[:8]) == [200] * 8
    allowed = [{"host": "chat.example"}, {"host": "CHAT.example:80"}, {"host": "localhost"}, {"host": "other.example"}]
    assert await statuses(server, "127.0.0.1", ALLOWED, *allowed) == [200, 200, 200, 403]


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
async def test_a_request_has_one_host_of_the_right_form(server: RunningServer, address: str) -> None:
    """As RFC 9112 demands, since a proxy in front could otherwise take another header for the one that counts."""
    one, absolute = b"host: localhost\r\n", b"http://localhost/health"
    requests = {
        200: [(b"/health", b"1.1", one), (b"/health", b"1.0", b""), (absolute, b"1.1", one)],
        400: [
            (b"/health", b"1.1", b""),
            (absolute, b"1.1", b""),
            (b"/health", b"1.1", one * 2),
            (b"/health", b"1.0", one + b"host: 127.0.0.1\r\n"),
            *((b"/health", b"1.1", b"host: %b\r\n" % host) for host in (b"[", b"a:b", b"a b", b"a/b", b"u@a", b"\xe9")),
        ],
    }
    async with running_gateway(server.target, address, HttpSettings(port=0)) as port:
        for status, heads in requests.items():
            for path, version, hosts in heads:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET %b HTTP/%b\r\nconnection: close\r\n%b\r\n" % (path, version, hosts))
                assert (await read_response(reader, writer))[0] == status, (path, version, hosts)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_only_allowed_websites_are_served(server: RunningServer, host: str) -> None:
    curl = {"content_type": "application/x-www-form-urlencoded"}
    own = [curl, {"host": "localhost:5", "origin": "http://localhost:5"}, {"origin": "https://LOCALHOST"}]
    foreign = [
        {"origin": origin, "content_type": content_type}
        for origin in ("https://evil.example", "http://localhost:3000", "null", "", "http://localhost.evil.example")
        for content_type in ("text/plain", "application/json")
    ]
    assert await statuses(server, host, HttpSettings(port=0), *own, *foreign) == [200] * 3 + [403] * 10
    allowed = [{"origin": "https://chat.example"}, {"origin": "https://other.example"}]
    assert await statuses(server, host, ALLOWED, *own, *allowed) == [200] * 4 + [403]
    everyone = HttpSettings(port=0, allow_origins=("*",))
    assert await statuses(server, host, everyone, *own, *foreign) == [200] * 13


async def test_an_error_names_the_flag_that_allows_the_caller(server: RunningServer) -> None:
    async with running_gateway(server.target, "localhost", HttpSettings(port=0)) as server.http_port:
        for headers, flag in (
            ({"host": "a.example"}, "--allow-host"),
            ({"origin": "http://a.example"}, "--allow-origin"),
        ):
            _, _, response = await read_response(*await send(server, "POST", PATH, BODY, **headers))
            assert response["error"]["type"] == "invalid_request_error"
            assert "a.example" in response["error"]["message"]
            assert flag in response["error"]["message"]


async def test_browsers_may_read_the_responses_to_allowed_websites(server: RunningServer) -> None:
    async def response_headers(method: str, **headers: str) -> tuple[int, dict[str, str]]:
        status, received, _ = await read_response(*await send(server, method, PATH, BODY, **headers))
        return status, received

    preflight = {"access_control_request_method": "POST", "access_control_request_headers": "authorization"}
    async with running_gateway(server.target, "localhost", ALLOWED) as server.http_port:
        status, headers = await response_headers("OPTIONS", origin="https://chat.example", **preflight)
        assert status == 200
        assert headers["access-control-allow-origin"] == "https://chat.example"
        assert "POST" in headers["access-control-allow-methods"]
        assert "authorization" in headers["access-control-allow-headers"]
        status, headers = await response_headers("POST", origin="https://chat.example")
        assert (status, headers["access-control-allow-origin"]) == (200, "https://chat.example")
        status, headers = await response_headers("OPTIONS", origin="https://evil.example", **preflight)
        assert (status, headers.get("access-control-allow-origin")) == (403, None)


@pytest.mark.parametrize(
    ("flag", "fields"),
    [
        *(("--allow-host", {"allow_hosts": (host,)}) for host in ("", "*", "http://a.example", "a.example:80")),
        *(("--allow-origin", {"allow_origins": (origin,)}) for origin in ("", "a.example", "https://a.example/")),
    ],
)
def test_a_host_or_origin_of_the_wrong_form_is_refused_at_start(flag: str, fields: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"^{flag}: "):
        HttpSettings(port=0, **fields)


@pytest.mark.parametrize("path", ["/", "/docs", "/static/main.js", "/openapi.json", "/v1/models", "/v1/nothing"])
async def test_every_response_has_security_headers(server: RunningServer, path: str) -> None:
    async with running_gateway(server.target, "localhost", HttpSettings(port=0)) as server.http_port:
        _, headers, _ = await read_response(*await send(server, "GET", path))
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
