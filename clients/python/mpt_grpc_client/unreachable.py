"""What is known of a server to which gRPC cannot connect, from what gRPC reports of it."""

from __future__ import annotations

import re
from urllib.parse import unquote

_TRIED = re.compile(r"last error: \w+: ipv[46]:(\S+): ")
_CAUSES = (
    ("WRONG_VERSION_NUMBER", "{} responds without TLS; connect without TLS, or check the port"),
    ("Tls handshake failed", "TLS with {} failed; check the certificates of both sides"),
    ("ALPN", "{} responds with TLS, but does not speak gRPC; check the port"),
    ("Expected SETTINGS frame", "{} responds, but does not speak gRPC; check the port"),
    (
        r"failed to connect.*(Socket closed|Connection reset)",
        "{} closed the connection at once; check the port, and whether it requires TLS or a certificate of the client",
    ),
    ("resolving", "the name in {} was not found; check the target"),
    ("", "no server responds at {}; start one with `mpt-grpc serve`, or check the target"),
)
"""What gRPC's text contains, and what it means; the first that matches."""


def explanation(details: str, target: str, proxy: str | None) -> str:
    """Returns gRPC's text about a connection that failed, after what it means.

    proxy: the environment variable that names the proxy for the target, if there is one.
    """
    where = target
    if proxy:
        where = f"{target} through the proxy in ${proxy}"
    elif (tried := _TRIED.search(details)) and (address := unquote(tried[1])) != target:
        # A name may have several addresses, and gRPC reports only how the last one failed.
        where = f"{address} (the last address of {target} that was tried)"
    meaning = next(meaning for cause, meaning in _CAUSES if re.search(cause, details))
    return f"{meaning.format(where)}: {details}"
