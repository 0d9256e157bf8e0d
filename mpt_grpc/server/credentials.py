"""The server's certificate as gRPC credentials."""

from __future__ import annotations

import grpc

from mpt_grpc.tls import Certificate, ServerCertificate


def server_credentials(certificate: ServerCertificate) -> grpc.ServerCredentials:
    """Returns credentials that present the certificate in effect at each handshake, with TLS 1.2 or newer."""
    configured = certificate.value

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal configured
        if (current := certificate.refresh()) is configured:
            return None
        configured = current
        return _configuration(current)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(configured),
        changed,  # type: ignore[arg-type]  # the types lack None, which changes nothing
        require_client_authentication=configured.client_ca is not None,
    )


def _configuration(certificate: Certificate) -> grpc.ServerCertificateConfiguration:
    pairs = [(certificate.key, certificate.chain)]
    return grpc.ssl_server_certificate_configuration(pairs, root_certificates=certificate.client_ca)
