"""Where and how a client connects, for both the synchronous and the asynchronous client."""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, replace
from threading import Thread
from typing import Any, Literal, TypeAlias, TypedDict

import grpc

from mpt_grpc_client.errors import InvalidTargetError
from mpt_grpc_client.metadata import CallMetadata, Pairs
from mpt_grpc_client.purpose import Purpose, channel_options
from mpt_grpc_client.targets import TLS_SCHEME, is_local, resolve_targets, split

ChannelOptions: TypeAlias = Sequence[tuple[str, int | str | bytes]]
SyncInterceptor: TypeAlias = grpc.UnaryUnaryClientInterceptor | grpc.UnaryStreamClientInterceptor
_SYNC_INTERCEPTORS = (
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
)


class ConnectionOptions(TypedDict, total=False):
    """How a client connects. Every option may be omitted."""

    tls: bool
    """Whether to use TLS, as with a `grpcs://` target and with each of the following options."""
    root_certificates: bytes
    """The authorities that may have issued the server's certificate, in PEM; by default those that gRPC trusts."""
    client_certificate: bytes
    """The client's own certificate, in PEM, for a server that requires one."""
    client_key: bytes
    """The key of the client's certificate, in PEM."""
    credentials: grpc.ChannelCredentials
    """Any credentials of gRPC, instead of the options above. gRPC sends the token with them only if they use TLS."""
    token: str
    """The access token, which every call sends."""
    allow_insecure_token: bool
    """Whether access tokens may be sent without TLS to another machine, where anyone on the way can read them."""
    metadata: Pairs | Callable[[], Pairs]
    """Metadata that every call sends: pairs, or a function that returns them, which is called for each call and for
    each server that continues it, and must not block. It is sent with and without TLS."""
    interceptors: Sequence[SyncInterceptor | grpc.aio.ClientInterceptor]
    """Interceptors of gRPC; those of `grpc.aio` for an `AsyncClient`."""
    options: ChannelOptions
    """Options of gRPC's channel, such as `[("grpc.keepalive_time_ms", 60_000)]`, instead of the client's own."""


_WITH_CHANNEL = {"token", "allow_insecure_token", "metadata"}
"""The options that have an effect on calls on a given channel."""


@dataclass(frozen=True)
class Endpoint:
    """A server, as gRPC connects to it."""

    target: str
    credentials: grpc.ChannelCredentials | None
    """None connects without TLS."""
    may_send_tokens: bool
    """Whether nobody on the way can read access tokens, or that is allowed."""
    metadata: CallMetadata
    interceptors: Sequence[Any]
    options: ChannelOptions
    name: str | None = None
    """The name in DNS that has the target as an address, and for which the certificate was issued."""

    def look_up(self) -> Future[tuple[Endpoint, ...]]:
        """Finds the endpoints of all addresses of a name in DNS; of another target, or an unknown name, this one."""
        found = Future[tuple[Endpoint, ...]]()
        found.set_running_or_notify_cancel()
        if self.target.startswith("dns:"):
            # A thread that the program does not wait for, since a lookup may take minutes and cannot be cancelled.
            Thread(target=lambda: found.set_result(self._addresses()), daemon=True).start()
        else:
            found.set_result((self,))
        return found

    def _addresses(self) -> tuple[Endpoint, ...]:
        host, port = split(self.target)
        port = port or "443"
        try:
            # gRPC connects to both addresses of localhost, of which the system may know one.
            hosts = ("127.0.0.1", "::1") if host == "localhost" else (host,)
            found = [item for one in hosts for item in socket.getaddrinfo(one, port, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError):
            return (self,)
        ips = dict.fromkeys(str(address[0]) for *_, address in found)
        return tuple(replace(self, target=f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}", name=host) for ip in ips)

    def channel(self, purpose: Purpose) -> grpc.Channel:
        options = self._options(purpose)
        if self.credentials is None:
            channel = grpc.insecure_channel(self.target, options)
        else:
            channel = grpc.secure_channel(self.target, self.credentials, options)
        return grpc.intercept_channel(channel, *self.interceptors)

    def aio_channel(self, purpose: Purpose) -> grpc.aio.Channel:
        options = self._options(purpose)
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, options, interceptors=self.interceptors)
        return grpc.aio.secure_channel(self.target, self.credentials, options, interceptors=self.interceptors)

    def _options(self, purpose: Purpose) -> tuple[tuple[str, int | str | bytes], ...]:
        own = channel_options(self.target, purpose)
        certified = () if self.name is None else (("grpc.ssl_target_name_override", self.name),)
        return tuple(dict((*own, *certified, *self.options)).items())


def look_up_all(endpoints: Iterable[Endpoint], timeout: float | None) -> Iterator[Endpoint]:
    """Yields the addresses of all endpoints as they are found. Raises TimeoutError if some are not found in time."""
    for lookup in as_completed([endpoint.look_up() for endpoint in endpoints], timeout):
        yield from lookup.result()


def resolve(
    target: str | Sequence[str] | None, options: ConnectionOptions, *, channel: object | None = None
) -> tuple[Endpoint, ...]:
    """Returns the servers of the targets that `resolve_targets` returns.

    channel: one that is used instead of the endpoint's, and whose security is unknown.
    Raises InvalidTargetError for such a target or one to which the token must not be sent, TypeError for an unknown
    option or one of a wrong type, and ValueError for options that do not go together.
    """
    known = ConnectionOptions.__optional_keys__
    if unknown := options.keys() - known:
        raise TypeError(f"unknown option {min(unknown)!r}; those of a connection are {', '.join(sorted(known))}")
    if channel is not None and (unused := options.keys() - _WITH_CHANNEL):
        raise ValueError(f"{min(unused)}: has no effect on a given channel; pass it to the channel itself")
    return tuple(_endpoint(resolved, options, channel is not None) for resolved in resolve_targets(target))


def check_kind(channel: object | None, options: ConnectionOptions, *, asynchronous: bool) -> None:
    """Raises TypeError for a channel or interceptors of the other kind of client, or of none."""
    kind, name = (grpc.aio.Channel, "grpc.aio.Channel") if asynchronous else (grpc.Channel, "grpc.Channel")
    if channel is not None and not isinstance(channel, kind):
        raise TypeError(f"channel: must be a {name}, not {type(channel).__name__}")
    interceptors = (grpc.aio.ClientInterceptor,) if asynchronous else _SYNC_INTERCEPTORS
    for interceptor in options.get("interceptors", ()):
        if not isinstance(interceptor, interceptors):
            names = "grpc.aio.UnaryUnaryClientInterceptor" if asynchronous else "grpc.UnaryUnaryClientInterceptor"
            raise TypeError(f"interceptors: {interceptor!r} is not one for this client, such as a {names}")


def _endpoint(resolved: str, options: ConnectionOptions, has_channel: bool) -> Endpoint:
    address = resolved.removeprefix(TLS_SCHEME)
    credentials = _credentials(options, has_scheme=resolved != address)
    is_allowed, is_given = options.get("allow_insecure_token", False), options.get("credentials") is not None
    # Given credentials need not be those of TLS.
    is_safe = is_allowed or (not is_given and (credentials is not None or is_local(address)))
    metadata = _metadata(options)
    if "token" in options and credentials is not None and is_given and not is_allowed:
        # Call credentials, which gRPC does not send without TLS.
        call_credentials = grpc.access_token_call_credentials(options["token"])
        credentials = grpc.composite_channel_credentials(credentials, call_credentials)
    elif "token" in options:
        if not (is_safe or has_channel):
            why = f"use TLS ('{TLS_SCHEME}{address}'), or allow_insecure_token inside a trusted network"
            raise InvalidTargetError(f"target {resolved!r} is another machine, and the token would be readable: {why}")
        metadata = metadata.and_([("authorization", f"Bearer {options['token']}")])
    interceptors = tuple(options.get("interceptors", ()))
    return Endpoint(address, credentials, is_safe, metadata, interceptors, _channel_arguments(options))


def _channel_arguments(options: ConnectionOptions) -> ChannelOptions:
    pairs = options.get("options", ())
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            why = "is not a pair of a name and a value, such as ('grpc.keepalive_time_ms', 60_000)"
            raise TypeError(f"options: {pair!r} {why}")
    return pairs


def _metadata(options: ConnectionOptions) -> CallMetadata:
    metadata = options.get("metadata", ())
    if "token" in options:
        check_token(options["token"])
    return CallMetadata(make_pairs=metadata) if callable(metadata) else CallMetadata().and_(metadata)


def check_token(token: str) -> None:
    """Raises TypeError or ValueError for what cannot be an access token."""
    if not isinstance(token, str):
        raise TypeError(f"token: must be a string, not {type(token).__name__}")
    if not re.fullmatch("[!-~]+", token):
        raise ValueError("token: must consist of visible ASCII characters")


def _credentials(options: ConnectionOptions, *, has_scheme: bool) -> grpc.ChannelCredentials | None:
    root = _pem(options, "root_certificates")
    key, certificate = _pem(options, "client_key"), _pem(options, "client_certificate")
    credentials = options.get("credentials")
    if not isinstance(credentials, grpc.ChannelCredentials | None):
        kind = type(credentials).__name__
        raise TypeError(
            f"credentials: must be those that grpc.ssl_channel_credentials returns, for example, not {kind}"
        )
    has_pem = bool(root or key or certificate)
    if credentials is not None and has_pem:
        raise ValueError("credentials: pass the certificates and the key to grpc.ssl_channel_credentials")
    if (key is None) != (certificate is None):
        raise ValueError("client_certificate and client_key: pass both or neither")
    if credentials is None and (has_scheme or has_pem or options.get("tls")):
        return grpc.ssl_channel_credentials(root, key, certificate)
    return credentials


def _pem(
    options: ConnectionOptions, name: Literal["root_certificates", "client_certificate", "client_key"]
) -> bytes | None:
    pem = options.get(name)
    if not isinstance(pem, bytes | None):
        raise TypeError(f"{name}: must be the content of a PEM file as bytes, not {type(pem).__name__}")
    return pem


def is_balanced(endpoints: Sequence[Endpoint], channel: object | None) -> bool:
    """Whether there may be several servers: several targets, or a name in DNS, which may have several addresses.

    channel: one that the client is given, which requires a single target.
    """
    if channel is not None and len(endpoints) > 1:
        raise InvalidTargetError(f"channel: requires one target, which it connects to, not {len(endpoints)}")
    return channel is None and (len(endpoints) > 1 or endpoints[0].target.startswith("dns:"))


def check_timeout(timeout: float | None) -> float | None:
    """Returns the timeout. Raises TypeError if it is not a number, and ValueError if it is not finite or negative."""
    if timeout is not None:
        if not isinstance(timeout, int | float):
            raise TypeError(f"timeout: must be a number of seconds, not {type(timeout).__name__}")
        if not 0 <= timeout < math.inf:
            raise ValueError(f"timeout: {timeout} s is not finite and at least 0; None waits indefinitely")
    return timeout
