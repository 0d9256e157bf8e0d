"""`mpt-grpc token new`: makes an access token."""

from __future__ import annotations

import argparse
import secrets
import sys
from datetime import UTC, datetime, timedelta

from mpt_grpc.access import check_name, token_digest


def run(parsed: argparse.Namespace) -> None:
    """Prints the entry for a tokens file, and the token to standard error, so that it does not end up in the file.

    Raises SettingsError for a name that cannot be used.
    """
    check_name(parsed.name)
    token = f"mpt-{secrets.token_urlsafe(32)}"
    roles = ", ".join(f'"{role}"' for role in parsed.role or ["generate"])
    entry = [
        "[[tokens]]",
        f'name = "{parsed.name}"',
        f'sha256 = "{token_digest(token).hex()}"',
        f"roles = [{roles}]",
    ]
    if parsed.days:
        entry.append(f"expires = {(datetime.now(UTC) + timedelta(days=parsed.days)).isoformat(timespec='seconds')}")
    print(f"the token of {parsed.name}, which is not shown again: {token}", file=sys.stderr)
    print("\n".join(entry), end="\n\n")
