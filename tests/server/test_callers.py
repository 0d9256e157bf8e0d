"""Who may call a server, over gRPC and HTTP, and what callers can do to each other."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from access_tokens import SECRETS, entry, write
from certificates import Authority
from conftest import demo_settings
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from http_calls import fetch, read_response, send
from prometheus_client import CollectorRegistry

from mpt_grpc.access import Access
from mpt_grpc.errors import ModelError
from mpt_grpc.gateway.metrics import MetricsPage
from mpt_grpc.gateway.serve import running_gateway
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings, ModelSettings, TelemetrySettings
from mpt_grpc_client import AsyncClient, Client, PermissionDeniedError, UnauthenticatedError
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1alpha1 import debug_pb2

OPTIONS: Any = {"max_new_tokens": 3, "temperature": 0}
BODY = {"prompt": "The fox", "max_tokens": 3, "temperature": 0}
LONG: Any = {"max_new_tokens": 1900, "temperature": 0, "ignore_eos": True}
PROMPT = "Once upon a time there was a fox who lived in a wood by the river, and every morning he went to the water."


@asynccontextmanager
async def serving(trace_file: Path | None = None, **changes: Any) -> AsyncIterator[RunningServer]:
    settings = replace(demo_settings(), telemetry=TelemetrySettings(trace_file=trace_file))
    changed = replace(settings, server=replace(settings.server, **changes), http=HttpSettings(port=0))
    async with running_server(changed) as server:
        yield server


@pytest.fixture(scope="module")
def tokens_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("access") / "tokens.toml")


@pytest.fixture(scope="module")
async def server(tokens_file: Path) -> AsyncIterator[RunningServer]:
    """A server that requires tokens, for tests that leave no state behind."""
    async with serving(tokens_file=tokens_file) as running:
        yield running


@pytest.fixture
async def clients(server: RunningServer) -> AsyncIterator[dict[str, AsyncClient]]:
    """A client of each caller, and one without a token, whose name is empty."""
    async with AsyncExitStack() as stack:
        tokens: dict[str, Any] = {"": {}, **{name: {"token": token} for name, token in SECRETS.items()}}
        yield {
            name: await stack.enter_async_context(AsyncClient(server.target, **token)) for name, token in tokens.items()
        }


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[name]}"}


def calls(client: AsyncClient) -> dict[str, Any]:
    """Returns a call of each method."""
    return {
        "Generate": client.generate("The fox", **OPTIONS),
        "StreamGenerate": anext(aiter(client.stream("The fox", **OPTIONS))),
        "Tokenize": client.tokenize("The fox"),
        "Detokenize": client.detokenize([1]),
        "Cancel": client.cancel("x"),
        "GetModelInfo": client.get_model_info(),
        "GetServerInfo": client.get_server_info(),
        "GetEngineState": client.get_engine_state(),
    }


async def outcome(call: Any) -> str:
    """Returns the status of a call."""
    try:
        await call
    except (UnauthenticatedError, PermissionDeniedError) as error:
        return error.code.name
    return "OK"


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("alice", {"GetEngineState"}),
        ("eve", {"Generate", "StreamGenerate", "Tokenize", "Detokenize", "Cancel"}),
        ("root", set()),
    ],
)
async def test_a_caller_may_call_what_its_roles_allow(name: str, refused: set[str], clients: Any) -> None:
    outcomes = {method: await outcome(call) for method, call in calls(clients[name]).items()}
    services = [service for module in (pb, debug_pb2) for service in module.DESCRIPTOR.services_by_name.values()]
    assert outcomes.keys() == {method.name for service in services for method in service.methods}
    assert {method for method, status in outcomes.items() if status == "PERMISSION_DENIED"} == refused
    assert {method for method, status in outcomes.items() if status == "OK"} == outcomes.keys() - refused


async def test_without_a_token_only_health_responds_over_grpc(server: RunningServer, clients: Any) -> None:
    assert {await outcome(call) for call in calls(clients[""]).values()} == {"UNAUTHENTICATED"}
    async with grpc.aio.insecure_channel(server.target) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        response = await health.Check(health_pb2.HealthCheckRequest())
        assert response.status == health_pb2.HealthCheckResponse.SERVING

        request = reflection_pb2.ServerReflectionRequest(list_services="")
        reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        with pytest.raises(grpc.aio.AioRpcError, match="an access token is required"):
            await anext(aiter(reflect(iter([request]))))
        (described,) = [response async for response in reflect(iter([request]), metadata=tuple(bearer("eve").items()))]
        assert "mpt.v1.TextGenerationService" in [s.name for s in described.list_services_response.service]


async def test_a_call_without_a_token_is_refused_before_its_message_arrives(server: RunningServer) -> None:
    async with grpc.aio.insecure_channel(server.target) as channel:
        # Over the wire, a unary call differs from a stream only by the number of messages.
        call = channel.stream_unary("/mpt.v1.TextGenerationService/Generate")()
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_reflection_can_be_disabled() -> None:
    async with serving(reflection=False) as server, grpc.aio.insecure_channel(server.target) as channel:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(reflect(iter([request]))))
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "path",
    ["/", "/docs", "/openapi.json", "/static/main.js", "/debug/engine", "/v1/models", "/tokenizer_info", "/missing"],
)
async def test_without_a_token_only_health_responds_over_http(path: str, server: RunningServer) -> None:
    status, headers, body = await read_response(*await send(server, "GET", path))
    assert status == 401
    assert headers["www-authenticate"].startswith("Bearer")
    error = body["error"]
    assert error["message"].startswith("an access token is required")
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert [(await fetch(server, "GET", public))[0] for public in ("/health", "/ready")] == [200, 200]


async def test_a_body_is_not_read_before_the_caller_is_known(server: RunningServer) -> None:
    reader, writer = await send(server, "POST", "/v1/completions", b"{", length=1 << 20)
    assert (await read_response(reader, writer))[0] == 401


async def test_http_callers_have_the_roles_of_their_tokens(server: RunningServer) -> None:
    assert (await fetch(server, "POST", "/v1/completions", BODY, **bearer("alice")))[0] == 200
    assert (await fetch(server, "POST", "/tokenize", {"prompt": "The fox"}, **bearer("alice")))[1]["count"] == 2
    assert (await fetch(server, "GET", "/debug/engine", **bearer("eve")))[0] == 200
    for name, method, path, body in (
        ("eve", "POST", "/v1/completions", BODY),
        ("eve", "POST", "/tokenize", {"prompt": "The fox"}),
        ("alice", "GET", "/debug/engine", None),
    ):
        status, refusal = await fetch(server, method, path, body, **bearer(name))
        assert (status, refusal["error"]["code"]) == (403, "permission_denied")
    for wrong in ("Bearer x", "Bearer \xff\t", "Basic !", f"Bearer {'x' * 40_000}", f"Basic {SECRETS['alice']}"):
        assert (await fetch(server, "POST", "/v1/completions", BODY, authorization=wrong))[0] == 401


async def test_a_browser_may_send_the_token_as_the_password(server: RunningServer) -> None:
    credentials = base64.b64encode(f"anyone:{SECRETS['alice']}".encode()).decode()
    assert (await fetch(server, "GET", "/", authorization=f"Basic {credentials}"))[0] == 200


async def test_a_caller_cancels_its_own_requests_and_an_administrator_all(clients: Any) -> None:
    for canceller, cancelled in (("bob", False), ("eve", False), ("alice", True), ("root", True)):
        request_id = f"cancelled-by-{canceller}"
        async with clients["alice"].stream("The fox", request_id=request_id, **LONG) as stream:
            await anext(stream)
            if canceller == "eve":
                with pytest.raises(PermissionDeniedError):
                    await clients[canceller].cancel(request_id)
                continue
            assert await clients[canceller].cancel(request_id, "missing") == ((request_id,) if cancelled else ())
            if cancelled:
                async for _ in stream:
                    pass
                assert stream.finish.reason.name == "CANCELLED"


async def test_callers_share_cached_blocks_only_by_a_salt_that_both_state(clients: Any) -> None:
    async def num_cached(name: str, **options: Any) -> int:
        return (await clients[name].generate(PROMPT, **OPTIONS, **options)).usage.num_cached_tokens

    assert await num_cached("alice") == 0
    assert await num_cached("alice") > 0
    assert await num_cached("bob") == 0
    assert await num_cached("bob", cache_salt="ours") == 0
    assert await num_cached("alice", cache_salt="ours") > 0


async def test_the_log_names_the_caller_and_never_the_token(
    server: RunningServer, clients: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mpt_grpc")
    await clients["alice"].generate("The fox", **OPTIONS)
    await fetch(server, "POST", "/v1/completions", BODY, **bearer("bob"))
    await fetch(server, "POST", "/v1/completions", BODY, authorization="Bearer unknown-token")
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition("caller=")[2].split()[0] for line in lines if line.startswith("Generate OK")] == [
        "'alice'",
        "'bob'",
    ]
    (refused,) = [line for line in lines if "UNAUTHENTICATED" in line]
    assert "error='the access token is not valid'" in refused
    assert not any(token in line for line in lines for token in (*SECRETS.values(), "unknown-token"))


async def test_the_span_names_the_caller(tokens_file: Path, tmp_path: Path) -> None:
    async with serving(tmp_path / "spans.jsonl", tokens_file=tokens_file) as server:
        await fetch(server, "POST", "/v1/completions", BODY, **bearer("bob"))
    spans = map(json.loads, (tmp_path / "spans.jsonl").read_text(encoding="utf-8").splitlines())
    (attributes,) = [span["attributes"] for span in spans if span["name"].endswith("/Generate")]
    assert attributes["mpt.caller"] == "bob"


async def generate_repeatedly(client: AsyncClient) -> None:
    while True:
        await client.generate("The fox", **OPTIONS)


async def test_a_token_that_is_removed_is_refused_from_then_on(tmp_path: Path) -> None:
    file = write(tmp_path / "tokens.toml", entry("old", "alice"), entry("new", "alice"))
    async with serving(tokens_file=file) as server:
        async with AsyncClient(server.target, token="old") as client:
            assert (await client.generate("The fox", **OPTIONS)).text
            assert (await fetch(server, "POST", "/v1/completions", BODY, authorization="Bearer old"))[0] == 200
            write(file, entry("new", "alice"))
            with pytest.raises(UnauthenticatedError, match="the access token is not valid"):
                await generate_repeatedly(client)  # the file is looked at every second
            assert (await fetch(server, "POST", "/v1/completions", BODY, authorization="Bearer old"))[0] == 401
            assert (await fetch(server, "POST", "/v1/completions", BODY, authorization="Bearer new"))[0] == 200


async def test_a_token_that_is_removed_is_refused_even_if_the_server_fails_to_check_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("mpt_grpc.server.server.trim", fail)
    file = write(tmp_path / "tokens.toml")
    async with serving(tokens_file=file) as server:
        async with AsyncClient(server.target, token=SECRETS["alice"]) as client:
            while "the server could not check itself" not in caplog.messages:
                await client.get_server_info()
            write(file, entry("new", "alice"))
            with pytest.raises(UnauthenticatedError, match="the access token is not valid"):
                await generate_repeatedly(client)


async def test_a_gateway_of_its_own_passes_on_the_token_of_each_caller(server: RunningServer) -> None:
    async with running_gateway(server.target, "127.0.0.1", HttpSettings(port=0)) as port:
        gateway: Any = type("Gateway", (), {"http_port": port})
        assert (await fetch(gateway, "POST", "/v1/completions", BODY, **bearer("alice")))[0] == 200
        assert (await fetch(gateway, "POST", "/tokenize", {"prompt": "The fox"}, **bearer("alice")))[1]["count"] == 2
        assert (await fetch(gateway, "POST", "/v1/completions", BODY))[0] == 401
        assert (await fetch(gateway, "GET", "/debug/engine", **bearer("alice")))[0] == 403
        assert (await fetch(gateway, "GET", "/ready"))[0] == 200


async def test_the_metrics_of_a_gateway_are_for_those_whom_a_server_has_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpt_grpc.gateway.callers._LIFETIME_S", 0)  # each request is checked
    file = write(tmp_path / "tokens.toml")

    async def statuses() -> list[int]:
        return [(await fetch(gateway, "GET", "/metrics", **token))[0] for token in (bearer("alice"), bearer("bob"), {})]

    async with AsyncExitStack() as stack:
        async with serving(tokens_file=file) as server:
            page = MetricsPage(CollectorRegistry(), Access(None))
            port = await stack.enter_async_context(
                running_gateway(server.target, "127.0.0.1", HttpSettings(port=0), metrics=page)
            )
            gateway: Any = type("Gateway", (), {"http_port": port})
            assert await statuses() == [200, 200, 401]
            write(file, entry(SECRETS["alice"], "alice"))
            while await statuses() != [200, 401, 401]:
                pass  # the file is looked at every second
        assert await statuses() == [200, 503, 503]


async def test_a_server_that_hangs_does_not_hold_up_the_metrics_of_a_gateway() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        target = f"127.0.0.1:{hanging.getsockname()[1]}"
        page = MetricsPage(CollectorRegistry(), Access(None))
        async with running_gateway(target, "127.0.0.1", HttpSettings(port=0), metrics=page) as port:
            gateway: Any = type("Gateway", (), {"http_port": port})
            async with asyncio.timeout(9):  # Prometheus waits for 10 s
                assert (await fetch(gateway, "GET", "/metrics"))[0] == 504


async def test_a_synchronous_client_sends_its_token(server: RunningServer) -> None:
    with Client(server.target, token=SECRETS["alice"]) as client:
        assert (await asyncio.to_thread(client.generate, "The fox", **OPTIONS)).text
        other = client.with_metadata(("x-tenant", "1"))
        assert await asyncio.to_thread(other.tokenize, "The fox")


@pytest.mark.parametrize(
    ("host", "protected", "missing"),
    [
        ("0.0.0.0", (), "without TLS (--tls-cert) and without access tokens (--tokens-file)"),
        ("0.0.0.0", ("tls",), "without access tokens (--tokens-file)"),
        ("0.0.0.0", ("tokens_file",), "without TLS (--tls-cert)"),
        ("0.0.0.0", ("tls", "tokens_file"), None),
        ("localhost", (), None),
        ("::1", (), None),
    ],
)
async def test_a_line_warns_of_what_is_missing_for_other_machines(
    host: str, protected: tuple[str, ...], missing: str | None, tmp_path: Path, tokens_file: Path, caplog: Any
) -> None:
    protections = {"tls": Authority.new().write_server(tmp_path), "tokens_file": tokens_file}
    settings = demo_settings(64)
    server = replace(settings.server, host=host, **{name: protections[name] for name in protected})
    with pytest.raises(ModelError):  # this suffices, and takes less time than to load a model
        async with running_server(replace(settings, server=server, model=ModelSettings(model="./missing"))):
            pass
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ([f"--host {host}: other machines can reach this server, {missing}"] if missing else [])


USER_PRINCIPAL = x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), b"\x0c\x05alice")
DIRECTORY = x509.DirectoryName(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "alice")]))


@pytest.mark.parametrize(
    ("common_name", "alternatives", "name"),
    [
        ("orders", [x509.RFC822Name("me@example.org")], "orders"),
        ("Müller", [], "Müller"),
        (None, [x509.RFC822Name("me@example.org")], "me@example.org"),
        (None, [USER_PRINCIPAL, x509.DNSName("orders")], "orders"),
        (None, [DIRECTORY, x509.UniformResourceIdentifier("spiffe://orders")], "spiffe://orders"),
        (None, [x509.IPAddress(ip_address("2001:db8::1")), x509.DNSName("orders")], "2001:db8::1"),
    ],
)
async def test_without_tokens_the_name_in_the_certificate_is_that_of_the_caller(
    common_name: str | None, alternatives: list[Any], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mpt_grpc.access")
    authority, clients = Authority.new(), Authority.new()
    mine = clients.client(*alternatives, common_name=common_name)
    async with serving(tls=authority.write_server(tmp_path, client_ca=clients)) as server:
        async with AsyncClient(server.target, root_certificates=authority.pem, **mine) as client:
            await client.generate("The fox", **OPTIONS)
        context = authority.context(tmp_path, mine)
        reader, writer = await asyncio.open_connection("localhost", server.http_port, ssl=context)
        body = json.dumps(BODY).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\nconnection: close"
        writer.write(head.encode() + b"\r\nmpt-grpc-certified-name-bin: cm9vdA==\r\n\r\n" + body)
        assert (await read_response(reader, writer))[0] == 200
    over_grpc, over_http = [line for line in caplog.messages if line.startswith("Generate OK")]
    assert f"caller={name!r}" in over_grpc
    assert f"caller={name!r}" in over_http


async def test_a_certificate_without_a_name_does_not_make_its_client_an_administrator(tmp_path: Path) -> None:
    authority, clients = Authority.new(), Authority.new()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(tls=authority.write_server(tmp_path, client_ca=clients)))
        named, nameless = [
            await stack.enter_async_context(AsyncClient(server.target, root_certificates=authority.pem, **certificate))
            for certificate in (clients.client("orders"), clients.client())
        ]
        async with named.stream("The fox", request_id="theirs", **LONG) as theirs:
            await anext(theirs)
            assert await nameless.cancel("theirs") == ()
        async with nameless.stream("The fox", request_id="its-own", **LONG) as own:
            await anext(own)
            assert await nameless.cancel("its-own") == ("its-own",)
        context = authority.context(tmp_path, clients.client())
        url = f"https://localhost:{server.http_port}/debug/engine"
        with await asyncio.to_thread(urlopen, url, context=context) as response:
            assert response.status == 200
