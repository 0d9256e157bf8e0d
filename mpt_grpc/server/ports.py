"""Where gRPC listens: a port of an address, or a Unix socket."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

import grpc

from mpt_grpc.listening import address, claim_socket, port_error
from mpt_grpc.server.credentials import server_credentials
from mpt_grpc.settings import ServerSettings
from mpt_grpc.tls import ServerCertificate


@contextmanager
def listening(
    server: grpc.aio.Server, settings: ServerSettings, certificate: ServerCertificate | None
) -> Iterator[str]:
    """Binds the port or the socket, and yields the target for clients on this machine. Raises SettingsError."""
    if settings.grpc_socket is None:
        credentials = None if certificate is None else server_credentials(certificate)
        at = address(
            settings.reachable_host, bind(server, settings.host, settings.grpc_port, "--grpc-port", credentials)
        )
        yield at if certificate is None else f"grpcs://{at}"
        return
    path = settings.grpc_socket.absolute()
    claim_socket(path, "--grpc-socket")
    target = f"unix:{quote(os.fsencode(path))}"  # gRPC decodes it
    server.add_insecure_port(target)
    try:
        yield target
    except BaseException:
        # gRPC removes only the file of a server that has started.
        path.unlink(missing_ok=True)
        raise


def bind(
    server: grpc.aio.Server, host: str, port: int, flag: str, credentials: grpc.ServerCredentials | None = None
) -> int:
    """Binds a port, which the flag sets, and returns it. Raises SettingsError."""
    try:
        # gRPC reports a bad host and a port in use with the same error.
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        try:
            if credentials is None:
                return server.add_insecure_port(address(host, port))
            return server.add_secure_port(address(host, port), credentials)
        except RuntimeError:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.bind((host, port))
            raise OSError(errno.EADDRINUSE, "") from None  # freed in the meantime
    except OSError as error:
        raise port_error(error, host, port, flag) from error
