"""The addresses of servers: which forms they have, and which of them are on this machine or behind a proxy."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from mpt_grpc_client.errors import InvalidTargetError

TLS_SCHEME = "grpcs://"
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""The variables that gRPC reads, in its order of precedence."""


def resolve_target(target: str | None) -> str:
    """Returns the given target, or that of the environment variable MPT_GRPC_TARGET, or `localhost:50051`.

    Raises InvalidTargetError for a URL, for a path without `unix:`, for a host without a port, for which gRPC would
    assume port 443, and for a port that does not exist, for which it would take another.
    """
    if target is not None and not isinstance(target, str):
        raise TypeError(f"target: must be a string such as 'localhost:50051', not {type(target).__name__}")
    resolved = target or os.environ.get("MPT_GRPC_TARGET") or "localhost:50051"
    if url := re.match(r"https?:/*([^/]*)", resolved):
        host = re.sub(r":\d+$", "", url[1]) or "localhost"
        scheme = TLS_SCHEME if resolved.startswith("https") else ""
        why = f"use the server's gRPC address, such as '{scheme}{host}:50051'"
        raise InvalidTargetError(f"target {resolved!r} is a URL: {why}")
    if resolved.startswith(("/", "./", "../")):
        raise InvalidTargetError(f"target {resolved!r} is a path: write 'unix:{resolved}' for a Unix socket")
    if not re.search("[:/]", resolved.removeprefix(TLS_SCHEME)):
        raise InvalidTargetError(f"target {resolved!r} has no port: write '{resolved}:50051'")
    address = re.fullmatch(r"([^:/]+|\[[^/]*\]):([^:/]*)", resolved.removeprefix(TLS_SCHEME))
    if address and not resolved.startswith("unix") and not (address[2].isdecimal() and 0 < int(address[2]) < 1 << 16):
        raise InvalidTargetError(f"target {resolved!r} has no valid port: use 1 to 65535")
    return resolved


def resolve_targets(target: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the targets in a list, or in a string in which commas separate them; see `resolve_target`."""
    if target is None or isinstance(target, str):
        target = (target or os.environ.get("MPT_GRPC_TARGET") or "").split(",")
    if isinstance(target, bytes) or not isinstance(target, Sequence):
        target = [target]  # which has the wrong type
    targets = tuple(dict.fromkeys(map(resolve_target, target)))
    if not targets:
        raise InvalidTargetError("target: the list is empty")
    return targets


def proxy_variable(target: str) -> str | None:
    """Returns the environment variable whose proxy gRPC uses for this target; None if it connects directly."""
    excluded = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy") or ""  # noqa: SIM112  (their usual case)
    host, _ = split(target)
    if is_local(target) or any(host.endswith(suffix.strip()) for suffix in excluded.split(",") if suffix.strip()):
        return None
    return next((name for name in _PROXY_VARIABLES if os.environ.get(name)), None)


def is_local(target: str) -> bool:
    """Whether a target is on this machine: a loopback address or a Unix socket."""
    host, _ = split(target)
    return (
        target.startswith(("unix:", "unix-abstract:"))
        or host in ("localhost", "::1")
        or host.endswith(".localhost")
        or bool(re.fullmatch(r"127(\.\d+){3}", host))
    )


def split(target: str) -> tuple[str, str]:
    """Returns the host and the port of a target, which may be empty."""
    address = re.sub(r"^(dns|ipv4|ipv6):", "", target).rpartition("/")[2]
    host, _, port = address.rpartition(":")
    return host.strip("[]").lower(), port
