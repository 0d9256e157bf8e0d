"""The certificate that a server presents over gRPC and HTTP, and whose certificates it accepts; in files that may
change."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mpt_grpc.errors import SettingsError
from mpt_grpc.file_value import FileValue, read_file
from mpt_grpc.settings import TlsSettings


@dataclass(frozen=True)
class Certificate:
    """The content of the files, in PEM, and a TLS context made of it."""

    chain: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


ServerCertificate: TypeAlias = FileValue[Certificate]


def server_certificate(settings: TlsSettings) -> ServerCertificate:
    """Returns the certificate of a server. Raises SettingsError with the flag of a file that cannot be used."""
    files = [settings.certificate, settings.key, *([settings.client_ca] if settings.client_ca else [])]
    return FileValue(files, lambda: _read(settings))


def http_context(certificate: ServerCertificate) -> ssl.SSLContext:
    """Returns a context for listening that presents the certificate in effect at each handshake."""

    def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = certificate.refresh().context

    context = certificate.value.context
    context.sni_callback = choose  # called for clients that send no name, too
    return context


def subject_name(certificate: Mapping[str, Any]) -> str:
    """Returns whom a client's certificate, as `ssl` describes it, was issued to: its common name, otherwise the first
    alternative name that is a DNS name, an email address, a URI or an IP address; empty if it has neither."""
    names = [
        value for attributes in certificate.get("subject", ()) for name, value in attributes if name == "commonName"
    ]
    return next(filter(None, [*names, *_alternative_names(certificate)]), "")


def _alternative_names(certificate: Mapping[str, Any]) -> Iterator[str]:
    for kind, value in certificate.get("subjectAltName", ()):
        if kind == "IP Address" and ":" in value:  # which gRPC abbreviates
            yield socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, value))
        elif kind in ("DNS", "email", "URI", "IP Address"):
            yield value


def _read(settings: TlsSettings) -> Certificate:
    chain, key = read_file(settings.certificate, "--tls-cert"), read_file(settings.key, "--tls-key")
    client_ca = None if settings.client_ca is None else read_file(settings.client_ca, "--tls-client-ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a password here, OpenSSL would ask for it in the terminal.
        context.load_cert_chain(settings.certificate, settings.key, password="")
    except (OSError, ValueError) as error:
        why = f"--tls-cert, --tls-key: {settings.certificate} and {settings.key}"
        raise SettingsError(f"{why} are not a certificate and its unencrypted key, in PEM") from error
    if client_ca is not None:
        try:
            context.load_verify_locations(cadata=client_ca.decode())
        except (ssl.SSLError, ValueError) as error:
            why = f"--tls-client-ca: {settings.client_ca} contains no certificates in PEM"
            raise SettingsError(why) from error
        context.verify_mode = ssl.CERT_REQUIRED
        # A resumed session would be accepted without its certificate being verified again.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    return Certificate(chain, key, client_ca, context)
