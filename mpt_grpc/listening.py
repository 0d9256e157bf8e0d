"""The addresses on which servers listen: how they are written, why one cannot be used, and leftover socket files."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from pathlib import Path

from mpt_grpc.errors import SettingsError

_MAX_SOCKET_PATH_BYTES = 107
"""The limit of Linux for the path of a Unix socket."""


def address(host: str, port: int) -> str:
    """Returns HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def exposure(host: str, missing: dict[str, bool]) -> str | None:
    """Returns a warning if other machines can reach `host`, and a protection is missing; None otherwise.

    missing: the protections, and whether each is missing.
    """
    names = [name for name, is_missing in missing.items() if is_missing]
    if not names or _is_loopback(host):
        return None
    return f"--host {host}: other machines can reach this server, without {' and without '.join(names)}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def port_error(error: OSError, host: str, port: int, flag: str) -> SettingsError:
    """Returns the error of a port that cannot be bound; `flag` selects the port."""
    at_fault, why = flag, error.strerror
    if isinstance(error, socket.gaierror):
        at_fault = "--host"
    elif error.errno == errno.EADDRNOTAVAIL:
        at_fault, why = "--host", "not an address of this machine"
    elif error.errno == errno.EADDRINUSE:
        why = f"the port is in use; is another mpt-grpc running? {flag} 0 selects a free one"
    return SettingsError(f"{at_fault}: cannot listen on {address(host, port)}: {why}")


def claim_socket(path: Path, flag: str) -> None:
    """Makes sure that a Unix socket can be bound to `path`, and removes the file that a killed server has left there.

    Raises SettingsError with the reason, which gRPC does not report; it would also replace the socket of a running
    server.
    """
    try:
        _claim(path)
    except OSError as error:
        raise SettingsError(f"{flag}: cannot listen on {path}: {error.strerror or error}") from error


def _claim(path: Path) -> None:
    if (num_bytes := len(os.fsencode(path))) > _MAX_SOCKET_PATH_BYTES:
        raise OSError(f"the path has {num_bytes} bytes, above the system's limit of {_MAX_SOCKET_PATH_BYTES}")
    if not path.parent.is_dir():
        raise OSError(f"there is no folder {path.parent}")
    with socket.socket(socket.AF_UNIX) as probe:
        if path.exists():
            if not path.is_socket():
                raise OSError("the file exists and is not a socket")
            probe.setblocking(False)
            status = probe.connect_ex(str(path))
            if status in (0, errno.EAGAIN):
                raise OSError("the socket is in use; is another mpt-grpc running?")
            if status != errno.ECONNREFUSED:
                raise OSError(status, os.strerror(status))
            path.unlink()
        probe.bind(str(path))
    path.unlink()
