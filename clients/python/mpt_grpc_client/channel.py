"""Where and how a client connects, for both the synchronous and the asynchronous client."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypedDict

import grpc
from opentelemetry import propagate

from mpt_grpc_client.errors import InvalidTargetError
from mpt_grpc_client.version import __version__

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""The maximum size of one message, in either direction."""

Metadata: TypeAlias = tuple[tuple[str, str], ...]
_TLS_SCHEME = "grpcs://"

_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""The variables that gRPC reads, in its order of precedence."""

_BALANCED_SERVICE_CONFIG = {
    # A server that drains or stalls gets no calls, and neither does an address of the target that does not respond.
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": "mpt.v1.TextGenerationService"},
}
_QUICK_DETECTION = (
    # How long gRPC waits for the answers to its other pings, and for a connection: by default 60 s and 20 s.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),
)
"""How soon a stream notices that its server's machine has vanished, and goes on elsewhere."""
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "mpt.v1.TextGenerationService"}],
            # gRPC retries a call only until its headers arrive, so a stream that has begun is never replayed. The
            # server's grpc-retry-pushback-ms replaces the backoff.
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}


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
    """Credentials made with gRPC, instead of the options above."""
    token: str
    """The access token, which every call sends."""
    allow_insecure_token: bool
    """Whether access tokens may be sent without TLS to another machine, where anyone on the way can read them."""


@dataclass(frozen=True)
class Endpoint:
    """A server, as gRPC connects to it."""

    target: str
    credentials: grpc.ChannelCredentials | None
    """None connects without TLS."""
    may_send_tokens: bool
    """Whether nobody on the way can read access tokens, or that is allowed."""
    metadata: Metadata
    """What every call sends."""
    name: str | None = None
    """The name in DNS of which the target is an address, and which its certificate has."""

    def addresses(self) -> tuple[Endpoint, ...]:
        """Returns the endpoints of all addresses of a name in DNS; of another target, or an unknown name, this one."""
        if not self.target.startswith("dns:"):
            return (self,)
        host, port = _split(self.target)
        port = port or "443"
        try:
            # gRPC connects to both addresses of localhost, of which the system may know one.
            hosts = ("127.0.0.1", "::1") if host == "localhost" else (host,)
            found = [item for one in hosts for item in socket.getaddrinfo(one, port, type=socket.SOCK_STREAM)]
        except OSError:
            return (self,)
        ips = dict.fromkeys(str(address[0]) for *_, address in found)
        return tuple(replace(self, target=f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}", name=host) for ip in ips)

    def channel(self, retries: bool, *, balanced: bool, checks_health: bool = True) -> grpc.Channel:
        options = self._options(retries, balanced, checks_health)
        if self.credentials is None:
            return grpc.insecure_channel(self.target, options)
        return grpc.secure_channel(self.target, self.credentials, options)

    def aio_channel(self, retries: bool, *, balanced: bool, checks_health: bool = True) -> grpc.aio.Channel:
        options = self._options(retries, balanced, checks_health)
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, options)
        return grpc.aio.secure_channel(self.target, self.credentials, options)

    def _options(self, retries: bool, balanced: bool, checks_health: bool) -> tuple[tuple[str, str | int], ...]:
        options = channel_options(self.target, retries, balanced=balanced, checks_health=checks_health)
        return options if self.name is None else (*options, ("grpc.ssl_target_name_override", self.name))


def resolve(
    target: str | Sequence[str] | None, options: ConnectionOptions, *, has_channel: bool = False
) -> tuple[Endpoint, ...]:
    """Returns the servers of the targets that `resolve_targets` returns.

    has_channel: whether another channel than the endpoint's is used, whose security is unknown.
    Raises InvalidTargetError for such a target or one to which the token must not be sent, TypeError for an unknown
    option or one of a wrong type, and ValueError for options that do not go together.
    """
    return tuple(_endpoint(resolved, options, has_channel) for resolved in resolve_targets(target))


def _endpoint(resolved: str, options: ConnectionOptions, has_channel: bool) -> Endpoint:
    known = ConnectionOptions.__optional_keys__
    if unknown := options.keys() - known:
        raise TypeError(f"unknown option {min(unknown)!r}; those of a connection are {', '.join(sorted(known))}")
    address = resolved.removeprefix(_TLS_SCHEME)
    credentials = _credentials(options, has_scheme=resolved != address)
    is_safe = credentials is not None or _is_local(address) or options.get("allow_insecure_token", False)
    token = options.get("token")
    if token is None:
        return Endpoint(address, credentials, is_safe, ())
    if not re.fullmatch("[!-~]+", token):
        raise ValueError("token: must consist of visible ASCII characters")
    if not (is_safe or has_channel):
        why = f"use TLS ('{_TLS_SCHEME}{address}'), or allow_insecure_token inside a trusted network"
        raise InvalidTargetError(f"target {resolved!r} is another machine, and the token would be readable: {why}")
    return Endpoint(address, credentials, is_safe, (("authorization", f"Bearer {token}"),))


def _credentials(options: ConnectionOptions, *, has_scheme: bool) -> grpc.ChannelCredentials | None:
    root = _pem(options, "root_certificates")
    key, certificate = _pem(options, "client_key"), _pem(options, "client_certificate")
    credentials = options.get("credentials")
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


def resolve_target(target: str | None) -> str:
    """Returns the given target, or that of the environment variable MPT_GRPC_TARGET, or `localhost:50051`.

    Raises InvalidTargetError for a URL, for a path without `unix:`, and for a host without a port, for which gRPC would
    assume port 443.
    """
    if target is not None and not isinstance(target, str):
        raise TypeError(f"target: must be a string such as 'localhost:50051', not {type(target).__name__}")
    resolved = target or os.environ.get("MPT_GRPC_TARGET") or "localhost:50051"
    if url := re.match(r"https?:/*([^/]*)", resolved):
        host = re.sub(r":\d+$", "", url[1]) or "localhost"
        scheme = _TLS_SCHEME if resolved.startswith("https") else ""
        why = f"use the server's gRPC address, such as '{scheme}{host}:50051'"
        raise InvalidTargetError(f"target {resolved!r} is a URL: {why}")
    if resolved.startswith(("/", "./", "../")):
        raise InvalidTargetError(f"target {resolved!r} is a path: write 'unix:{resolved}' for a Unix socket")
    if not re.search("[:/]", resolved.removeprefix(_TLS_SCHEME)):
        raise InvalidTargetError(f"target {resolved!r} has no port: write '{resolved}:50051'")
    return resolved


def resolve_targets(target: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the targets in a list, or in a string in which commas separate them; see `resolve_target`."""
    if target is None or isinstance(target, str):
        target = (target or os.environ.get("MPT_GRPC_TARGET") or "").split(",")
    targets = tuple(dict.fromkeys(map(resolve_target, target if isinstance(target, Sequence) else [target])))
    if not targets:
        raise InvalidTargetError("target: the list is empty")
    return targets


def is_balanced(endpoints: Sequence[Endpoint], channel: object | None) -> bool:
    """Whether there may be several servers: several targets, or a name in DNS, which may have several addresses.

    channel: one that the client is given, which requires a single target.
    """
    if channel is not None and len(endpoints) > 1:
        raise InvalidTargetError(f"channel: requires one target, which it connects to, not {len(endpoints)}")
    return channel is None and (len(endpoints) > 1 or endpoints[0].target.startswith("dns:"))


def check_timeout(timeout: float | None) -> float | None:
    """Returns the timeout. Raises TypeError if it is not a number."""
    if timeout is not None and not isinstance(timeout, int | float):
        raise TypeError(f"timeout: must be a number of seconds, not {type(timeout).__name__}")
    return timeout


def proxy_variable(target: str) -> str | None:
    """Returns the environment variable whose proxy gRPC uses for this target; None if it connects directly."""
    excluded = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""  # noqa: SIM112  (their usual case)
    if _is_local(target) or any(
        _host(target).endswith(suffix.strip()) for suffix in excluded.split(",") if suffix.strip()
    ):
        return None
    return next((name for name in _PROXY_VARIABLES if os.environ.get(name)), None)


def channel_options(
    target: str, retries: bool, *, balanced: bool = False, checks_health: bool = True
) -> tuple[tuple[str, str | int], ...]:
    """Returns the options of a channel to this target.

    balanced: whether it is one of several servers, so that the client's own code makes the retries.
    checks_health: whether one of several gets no calls while it drains.
    """
    service_config = {} if not checks_health else _BALANCED_SERVICE_CONFIG if balanced else _SERVICE_CONFIG
    return (
        # gRPC would send calls to this machine through a proxy too, unless no_proxy lists them.
        ("grpc.enable_http_proxy", int(not _is_local(target))),
        ("grpc.primary_user_agent", f"mpt-grpc-client/{__version__}"),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.service_config", json.dumps(service_config)),
        ("grpc.enable_retries", int(retries and not balanced)),
        # A call is retried only if this buffer can hold it; the default of 256 KiB would exclude long prompts.
        ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
        # By default gRPC takes up to two minutes to notice that a server is back.
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.keepalive_time_ms", 10_000 if balanced else 30_000),
        ("grpc.keepalive_timeout_ms", 5_000 if balanced else 10_000),
        *(_QUICK_DETECTION if balanced else ()),
        # Without this, pings stop during a long unary call, and a server that has vanished goes unnoticed.
        ("grpc.http2.max_pings_without_data", 0),
    )


def _is_local(target: str) -> bool:
    """Whether a target is on this machine: a loopback address or a Unix socket."""
    host = _host(target)
    return (
        target.startswith(("unix:", "unix-abstract:"))
        or host in ("localhost", "::1")
        or host.endswith(".localhost")
        or bool(re.fullmatch(r"127(\.\d+){3}", host))
    )


def _host(target: str) -> str:
    return _split(target)[0]


def _split(target: str) -> tuple[str, str]:
    """Returns the host and the port of a target, which may be empty."""
    address = re.sub(r"^(dns|ipv4|ipv6):", "", target).rpartition("/")[2]
    host, _, port = address.rpartition(":")
    return host.strip("[]").lower(), port


def trace_metadata() -> Metadata:
    """Returns the current trace context as metadata: `traceparent` by default; empty outside a span."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())
