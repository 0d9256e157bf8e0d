"""The flags that `serve` and `gateway` share: where they listen, with what certificate, and how long calls may take."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpt_grpc.commands.units import seconds
from mpt_grpc.errors import SettingsError
from mpt_grpc.settings import HttpSettings, ServerSettings, TlsSettings


def add_http(parser: argparse._ActionsContainer) -> None:
    """Adds where the OpenAI-compatible API is served."""
    parser.add_argument(
        "--host",
        default=ServerSettings().host,
        help="address to listen on; 0.0.0.0 for all",
    )
    parser.add_argument(
        "--http-port",
        type=int,
        default=HttpSettings().port,
        metavar="N",
        help="port of the OpenAI-compatible API and the web page; 0 selects a free port",
    )
    parser.add_argument(
        "--strict-model-names",
        action="store_true",
        help="refuse HTTP requests that name another model instead of serving them with the loaded one",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="accept this name in the Host header on a loopback address; may be repeated (default: only names of this"
        " machine)",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        metavar="ORIGIN",
        help="accept requests from this website, such as http://localhost:3000; * for all; may be repeated (default:"
        " none)",
    )


def add_tls(parser: argparse._ActionsContainer) -> None:
    """Adds the certificates of a server."""
    for flag, what in (
        ("--tls-cert", "serve with TLS and this certificate, followed by those of its issuers, in PEM"),
        ("--tls-key", "key of the certificate"),
        ("--tls-client-ca", "accept only clients with a certificate of one of these authorities"),
    ):
        parser.add_argument(flag, type=Path, metavar="FILE", help=f"{what}; read again when it changes (default: none)")


def add_timeouts(parser: argparse._ActionsContainer) -> None:
    """Adds how long a shutdown may take, and how long callers may leave a stream unread."""
    parser.add_argument(
        "--grace",
        type=seconds,
        default="30s",
        metavar="TIME",
        help="time for requests in progress to finish after SIGTERM",
    )
    parser.add_argument(
        "--read-timeout",
        type=seconds,
        default="600s",
        metavar="TIME",
        help="end streams to which nothing could be sent for this long, because their callers do not read",
    )


def http_settings(parsed: argparse.Namespace, port: int | None) -> HttpSettings:
    """Returns the settings given by the flags that `serve` and `gateway` share. Raises SettingsError."""
    return HttpSettings(
        port=port,
        strict_model_names=parsed.strict_model_names,
        allow_hosts=tuple(parsed.allow_host or ()),
        allow_origins=tuple(parsed.allow_origin or ()),
    )


def tls_settings(parsed: argparse.Namespace) -> TlsSettings | None:
    """Returns the files of the server's certificate, or None without TLS. Raises SettingsError if one is missing."""
    if parsed.tls_cert and parsed.tls_key:
        return TlsSettings(parsed.tls_cert, parsed.tls_key, parsed.tls_client_ca)
    if parsed.tls_cert or parsed.tls_key:
        missing, given = ("--tls-key", "--tls-cert") if parsed.tls_cert else ("--tls-cert", "--tls-key")
        raise SettingsError(f"{missing}: required with {given}")
    if parsed.tls_client_ca:
        raise SettingsError("--tls-client-ca: requires --tls-cert and --tls-key")
    return None
