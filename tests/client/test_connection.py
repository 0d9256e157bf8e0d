"""The options of a client's connection: which are accepted, and where an access token may be sent."""

from __future__ import annotations

import asyncio
import itertools

import grpc
import pytest
from grpc import experimental

from mpt_grpc_client import AsyncClient, Client, InvalidTargetError, MptGrpcError, NotFoundError

PEM = b"-----BEGIN CERTIFICATE-----"


@pytest.mark.parametrize("target", ["models.example:50051", "dns:///models.example:50051", "10.0.0.1:50051"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_token_is_not_sent_to_another_machine_without_tls_unless_that_is_allowed(kind, target):
    with pytest.raises(InvalidTargetError, match=r"is another machine, .*: use TLS \('grpcs://.*allow_insecure_token"):
        kind(target, token="secret")
    kind(target, token="secret", allow_insecure_token=True)
    kind(target, token="secret", tls=True)
    kind(target, token="secret", root_certificates=PEM)
    kind(target, token="secret", credentials=grpc.ssl_channel_credentials())
    with pytest.raises(InvalidTargetError):
        kind(target, token="secret", allow_insecure_token=False)


@pytest.mark.parametrize("target", ["localhost:99999", "localhost:0", "localhost:", "[::1]:x", "grpcs://a.example:-1"])
def test_a_port_that_does_not_exist_is_refused(target):
    with pytest.raises(InvalidTargetError, match="has no valid port: use 1 to 65535"):
        Client(target)


@pytest.mark.parametrize(
    "target", ["xds:///models", "ipv6:[::1]:5", "ipv4:127.0.0.1:5", "[::1]:5", "unix:x", "unix:a:b"]
)
def test_other_targets_are_left_to_grpc(target):
    Client(target)


def test_a_target_of_bytes_is_a_type_error():
    with pytest.raises(TypeError, match=r"^target: must be a string .*, not bytes"):
        Client(b"localhost:50051")


@pytest.mark.parametrize("target", ["grpcs://models.example:50051", "localhost:50051", "[::1]:50051", "unix:/run/x"])
def test_a_token_is_sent_with_tls_and_within_the_machine(target):
    Client(target, token="secret")


async def test_a_token_is_not_sent_with_credentials_without_tls_unless_that_is_allowed(scripted, target):
    options = {"token": "secret", "credentials": experimental.insecure_channel_credentials(), "timeout": 30}
    with Client(target, **options) as client, pytest.raises(MptGrpcError, match="sufficient security level"):
        client.get_model_info()
    async with AsyncClient(target, **options) as client:
        with pytest.raises(MptGrpcError, match="sufficient security level"):
            await client.get_model_info()
    assert not scripted.requests
    with Client(target, allow_insecure_token=True, **options) as client:
        client.get_model_info()
    assert scripted.metadata[0]["authorization"] == "Bearer secret"


def test_the_security_of_a_given_channel_is_the_callers_concern():
    with grpc.insecure_channel("models.example:50051") as channel:
        Client("models.example:50051", channel=channel, token="secret")


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"tsl": True}, TypeError, "unknown option 'tsl'; those of a connection are allow_insecure_token, client_"),
        ({"root_certificates": "ca.pem"}, TypeError, "root_certificates: must be the content of a PEM file as bytes"),
        ({"client_key": PEM}, ValueError, "client_certificate and client_key: pass both or neither"),
        ({"client_certificate": PEM}, ValueError, "client_certificate and client_key: pass both or neither"),
        (
            {"credentials": grpc.ssl_channel_credentials(), "root_certificates": PEM},
            ValueError,
            "credentials: pass the certificates and the key to grpc.ssl_channel_credentials",
        ),
        ({"token": "a b"}, ValueError, "token: must consist of visible ASCII characters"),
        ({"token": ""}, ValueError, "token: must consist of visible ASCII characters"),
        ({"token": 5}, TypeError, "token: must be a string, not int"),
        ({"credentials": "tls"}, TypeError, "credentials: must be those that grpc.ssl_channel_credentials returns"),
        ({"channel": "localhost:1"}, TypeError, "channel: must be a grpc.*Channel, not str"),
        ({"interceptors": [print]}, TypeError, "interceptors: <built-in function print> is not one for this client"),
        ({"options": {"grpc.keepalive_time_ms": 1}}, TypeError, "options: 'grpc.keepalive_time_ms' is not a pair"),
        ({"metadata": "x-tenant"}, TypeError, "metadata: must be pairs such as .*, not str"),
        ({"metadata": [("x-tenant",)]}, TypeError, "metadata: .* is not a pair of a name and a value"),
        ({"metadata": [("X-Tenant", "1")]}, ValueError, "metadata: 'X-Tenant' must consist of lower-case letters"),
        ({"metadata": [("x-tenant", 1)]}, TypeError, "metadata: the value of 'x-tenant' must be a string"),
        ({"metadata": [("x-tenant-bin", "1")]}, TypeError, "metadata: the value of 'x-tenant-bin' must be bytes"),
        ({"metadata": [("x-tenant", "ä")]}, ValueError, "metadata: the value of 'x-tenant' must consist of printable"),
    ],
)
def test_options_that_do_not_fit_are_named(options, error, why):
    for kind in (Client, AsyncClient):
        with pytest.raises(error, match=f"^{why}"):
            kind("localhost:50051", **options)


def test_a_secure_target_needs_a_port_too():
    with pytest.raises(InvalidTargetError, match=r"has no port: write 'grpcs://models.example:50051'"):
        Client("grpcs://models.example")


def test_clients_that_share_a_connection_are_closed_together():
    client = Client("localhost:1")
    other = client.with_metadata(("x-tenant", "1"))
    client.close()
    with pytest.raises(MptGrpcError, match="the client is closed"):
        other.get_model_info()


async def test_asynchronous_clients_that_share_a_connection_are_closed_together():
    client = AsyncClient("localhost:1")
    other = client.with_metadata(("x-tenant", "1"))
    await client.close()
    with pytest.raises(MptGrpcError, match="the client is closed"):
        await other.get_model_info()


@pytest.mark.parametrize("options", [{"options": [("grpc.keepalive_time_ms", 1)]}, {"interceptors": []}, {"tls": True}])
def test_options_that_a_given_channel_would_ignore_are_refused(options):
    with grpc.insecure_channel("localhost:1") as channel:
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: has no effect on a given channel"):
            Client("localhost:1", channel=channel, **options)


class Label(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds metadata to every call."""

    def intercept_unary_unary(self, continuation, client_call_details, request):
        return continuation(_labelled(client_call_details), request)

    intercept_unary_stream = intercept_unary_unary


class AsyncLabel(grpc.aio.UnaryUnaryClientInterceptor):
    """Adds metadata to every unary call."""

    async def intercept_unary_unary(self, continuation, client_call_details, request):
        return await continuation(_labelled(client_call_details), request)


class AsyncStreamLabel(grpc.aio.UnaryStreamClientInterceptor):
    """Adds metadata to every stream."""

    async def intercept_unary_stream(self, continuation, client_call_details, request):
        return await continuation(_labelled(client_call_details), request)


def _labelled(details):
    return details._replace(metadata=[*details.metadata, ("x-label", "intercepted")])


async def test_interceptors_see_calls_and_streams(scripted, target):
    with Client(target, interceptors=[Label()]) as client:
        client.get_model_info()
        assert "".join(client.stream("Once")) == "Once 🐈 upon"
    async with AsyncClient(target, interceptors=[AsyncLabel(), AsyncStreamLabel()]) as client:
        await client.get_model_info()
        assert "".join([text async for text in client.stream("Once")]) == "Once 🐈 upon"
    assert [sent["x-label"] for sent in scripted.metadata] == ["intercepted"] * 4


async def test_errors_and_cancellation_are_the_same_with_interceptors(service, endless, target):
    service.refuse(grpc.StatusCode.NOT_FOUND, "no such model", "UNKNOWN_MODEL", times=2)
    with Client(target, interceptors=[Label()]) as client:
        with pytest.raises(NotFoundError):
            client.get_model_info()
    async with AsyncClient(target, interceptors=[AsyncLabel(), AsyncStreamLabel()]) as client:
        with pytest.raises(NotFoundError):
            await client.get_model_info()
        async with client.stream("Once") as stream:
            assert await anext(stream) == "Once 🐈"
    assert await asyncio.to_thread(endless.left.wait, 10)


async def test_metadata_is_sent_with_every_call(scripted, target):
    pairs = [("x-tenant", "1"), ("x-key-bin", b"\x00")]
    with Client(target, metadata=pairs, token="secret") as client:
        list(client.with_metadata(("x-user", "ann")).stream("Once"))
    async with AsyncClient(target, metadata=pairs, token="secret") as client:
        await client.with_metadata(("x-user", "ann")).get_model_info()
    for sent in scripted.metadata:
        assert sent.items() >= {**dict(pairs), "authorization": "Bearer secret", "x-user": "ann"}.items()
    assert len(scripted.metadata) == 2


async def test_metadata_may_be_a_function_that_is_called_for_each_call(scripted, target):
    numbers = itertools.count()

    def metadata():
        return [("x-number", str(next(numbers)))]

    with Client(target, metadata=metadata) as client:
        client.get_model_info()
        list(client.stream("Once"))
    async with AsyncClient(target, metadata=metadata) as client:
        await client.get_model_info()
    assert [sent["x-number"] for sent in scripted.metadata] == ["0", "1", "2"]


def test_what_a_function_returns_as_metadata_is_checked(scripted, target):
    with Client(target, metadata=lambda: [("X-Tenant", "1")]) as client:
        with pytest.raises(ValueError, match="'X-Tenant' must consist of lower-case letters"):
            client.get_model_info()
    assert not scripted.requests


async def test_options_of_the_channel_replace_the_clients_own(scripted, target):
    options = [("grpc.primary_user_agent", "mine")]
    with Client(target, options=options) as client:
        client.get_model_info()
    async with AsyncClient(target, options=options) as client:
        await client.get_model_info()
    assert all(str(sent["user-agent"]).startswith("mine ") for sent in scripted.metadata)


async def test_clients_share_a_connection_unless_their_options_say_otherwise(scripted, target):
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with AsyncClient(target) as first, AsyncClient(target) as second:
        async with AsyncClient(target, options=own) as third, AsyncClient(target, options=own) as fourth:
            for client in (first, second, third, fourth):
                await client.get_model_info()
    assert scripted.peers[0] == scripted.peers[1]
    assert len(set(scripted.peers)) == 3
