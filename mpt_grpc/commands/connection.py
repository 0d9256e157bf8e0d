"""The flags of a connection to a server, without grpc, since they are also built for `--help`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mpt_grpc.errors import SettingsError

if TYPE_CHECKING:
    from mpt_grpc_client import ConnectionOptions


def add_connection(parser: argparse._ActionsContainer, target: argparse._ActionsContainer | None = None) -> None:
    """Adds the address of the server, to the group `target` if there is one, and how to connect to it."""
    (target or parser).add_argument(
        "--target",
        metavar="HOST:PORT|unix:PATH,...",
        help="gRPC address, or several, which continue each other's outputs; grpcs://HOST:PORT uses TLS (default:"
        " MPT_GRPC_TARGET, or localhost:50051)",
    )
    for flag, what in (
        ("--root-certificates", "authorities of the server's certificate, in PEM, for TLS (default: gRPC's)"),
        ("--client-certificate", "own certificate, in PEM, for a server that requires one (default: none)"),
        ("--client-key", "key of the own certificate (default: none)"),
    ):
        parser.add_argument(flag, type=_content, metavar="FILE", help=what)
    parser.add_argument(
        "--allow-insecure-token",
        action="store_const",
        const=True,
        help="send access tokens, such as that in MPT_GRPC_TOKEN, without TLS to another machine, too",
    )


def client_options(parsed: argparse.Namespace) -> ConnectionOptions:
    """Returns the options of a client's connection, with the access token in MPT_GRPC_TOKEN, if there is one.

    Raises SettingsError if that is not a valid token.
    """
    from mpt_grpc_client.channel import check_token

    options = connection_options(parsed)
    if token := os.environ.get("MPT_GRPC_TOKEN"):
        try:
            check_token(token)
        except ValueError as error:
            raise SettingsError(f"MPT_GRPC_TOKEN: {error}") from error
        options["token"] = token
    return options


def connection_options(parsed: argparse.Namespace) -> ConnectionOptions:
    """Returns the flags that were given, except the target, as the client's keyword arguments."""
    from mpt_grpc_client import ConnectionOptions

    names = ConnectionOptions.__optional_keys__
    return cast(
        ConnectionOptions, {name: value for name, value in vars(parsed).items() if name in names and value is not None}
    )


def usage_error(parsed: argparse.Namespace) -> str | None:
    """Returns the error of a combination of flags that is not valid, or None."""
    if (getattr(parsed, "client_certificate", None) is None) != (getattr(parsed, "client_key", None) is None):
        return "argument --client-certificate, --client-key: pass both or neither"
    return None


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{file}: {error.strerror}") from error
