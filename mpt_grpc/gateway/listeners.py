"""The sockets on which the HTTP servers accept connections: on all addresses of a host, as gRPC listens on them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from mpt_grpc.listening import port_error
from mpt_grpc.settings import ALL_ADDRESSES

_MAX_QUEUED_CONNECTIONS = 2048
"""The connections that the system accepts ahead of this process."""


@contextmanager
def listening(host: str, port: int, flag: str) -> Iterator[list[socket.socket]]:
    """Listens inside the block. Raises SettingsError, which names the flag of the port."""
    listeners = _listen(host, port, flag)
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


def _listen(host: str, port: int, flag: str) -> list[socket.socket]:
    """Returns sockets on all addresses of the host, on one port."""
    listeners: list[socket.socket] = []
    try:
        for family, address in _addresses(host):
            # asyncio disables Nagle's algorithm, which delays a response of two packets by 40 ms, only for this
            # protocol.
            listener: socket.socket = _Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((address, port))
            except OSError as error:
                listener.close()
                if listeners and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue  # this machine has no IPv6
                raise
            listeners.append(listener)
            port = listener.getsockname()[1]
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise port_error(error, host, port, flag) from error
    return listeners


class _Listener(socket.socket):
    """A socket with a queue of connections whose length is its own, instead of the one that asyncio passes.

    asyncio accepts as many connections as that in one turn of its loop. While no file can be opened, each attempt logs
    a traceback and plans another turn: thousands of them would stop all streams and fill the disk.
    """

    def listen(self, _backlog: int = 0) -> None:
        super().listen(_MAX_QUEUED_CONNECTIONS)


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    if host in ALL_ADDRESSES:
        return [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]
    if host == "localhost":
        return [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))
