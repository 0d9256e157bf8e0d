"""Certificates of a server and its clients, in files."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from mpt_grpc.settings import TlsSettings


@dataclass(frozen=True)
class Authority:
    """An authority that issues certificates for this machine and for clients."""

    ca: trustme.CA

    @classmethod
    def new(cls) -> Authority:
        return cls(trustme.CA())

    @property
    def pem(self) -> bytes:
        return self.ca.cert_pem.bytes()

    def write_server(self, folder: Path, *, client_ca: Authority | None = None, **options: Any) -> TlsSettings:
        """Writes a server's certificate, replacing an earlier one in the folder, and returns the files."""
        issued = self.ca.issue_cert("localhost", "127.0.0.1", **options)
        settings = TlsSettings(folder / "server.pem", folder / "server.key", client_ca and folder / "clients.pem")
        issued.private_key_pem.write_to_path(settings.key)
        settings.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        if client_ca is not None and settings.client_ca is not None:
            settings.client_ca.write_bytes(client_ca.pem)
        return settings

    def client(self, *names: str | x509.GeneralName, common_name: str | None = None) -> Any:
        """Returns the options of a client with a certificate of this authority, with these alternative names."""
        authority, key = x509.load_pem_x509_certificate(self.pem), ec.generate_private_key(ec.SECP256R1())
        subject = [] if common_name is None else [x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)]
        builder = x509.CertificateBuilder(
            authority.subject,
            x509.Name(subject),
            key.public_key(),
            x509.random_serial_number(),
            authority.not_valid_before_utc,
            authority.not_valid_after_utc,
        )
        if alternatives := [x509.DNSName(name) if isinstance(name, str) else name for name in names]:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        own_key = load_pem_private_key(self.ca.private_key_pem.bytes(), None)
        assert isinstance(own_key, ec.EllipticCurvePrivateKey)
        issued = builder.sign(own_key, SHA256())
        return {
            "client_certificate": issued.public_bytes(Encoding.PEM),
            "client_key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        }

    def context(self, folder: Path, client: Any = None) -> ssl.SSLContext:
        """Returns a client's TLS context that trusts this authority; with `client`, it presents that certificate."""
        context = ssl.create_default_context(cadata=self.pem.decode())
        if client is not None:
            file = folder / "client.pem"
            file.write_bytes(client["client_key"] + client["client_certificate"])
            context.load_cert_chain(file)
        return context
