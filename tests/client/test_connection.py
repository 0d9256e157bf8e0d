"""The options of a client's connection: which are accepted, and where an access token may be sent."""

from __future__ import annotations

import grpc
import pytest

from mpt_grpc_client import AsyncClient, Client, InvalidTargetError, MptGrpcError

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


@pytest.mark.parametrize("target", ["grpcs://models.example:50051", "localhost:50051", "[::1]:50051", "unix:/run/x"])
def test_a_token_is_sent_with_tls_and_within_the_machine(target):
    Client(target, token="secret")


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
