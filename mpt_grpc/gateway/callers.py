"""Who calls over HTTP: what the gateway passes on of it to the gRPC server, which decides, and knows all callers."""

from __future__ import annotations

import base64
import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeAlias

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from mpt_grpc.access import CERTIFIED_NAME
from mpt_grpc.gateway.errors import error_response
from mpt_grpc_client import AsyncClient, MptGrpcError, PermissionDeniedError, UnauthenticatedError

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
PUBLIC_PATHS = ("/health", "/ready")
"""What is served without asking who calls."""
METRICS_PATH = "/metrics"
_LIFETIME_S = 5
_MAX_REMEMBERED = 1000
_TIMEOUT_S = 10
_METRICS_TIMEOUT_S = 2
"""Far below the 10 s in which Prometheus expects the page."""
_MAX_AUTHORIZATION = 1024


@dataclass(frozen=True)
class KnownServer:
    """What requests are checked against."""

    model_name: str
    max_in_progress: int
    """The maximum number of outputs that the server runs and queues."""


class Callers:
    """The gRPC server as each caller sees it: a client with the caller's credentials."""

    def __init__(self, client: AsyncClient, *, passes_tokens: bool, passes_certificates: bool) -> None:
        """passes_tokens, passes_certificates: whether the server gets access tokens, and the names in certificates."""
        self._client = client
        self._passes_tokens, self._passes_certificates = passes_tokens, passes_certificates
        self._known: OrderedDict[Metadata, tuple[KnownServer, float]] = OrderedDict()

    def metadata(self, scope: Scope) -> Metadata:
        """Returns the metadata that identifies the caller of a request."""
        metadata: list[tuple[str, str | bytes]] = []
        if self._passes_tokens and (authorization := Headers(scope=scope).get("authorization")) is not None:
            # Of what gRPC could not send, enough remains to be refused.
            sendable = re.sub(r"[^ -~]", "?", bearer(authorization))[:_MAX_AUTHORIZATION]
            metadata.append(("authorization", sendable))
        if self._passes_certificates and (name := scope["state"].get("certified_name")) is not None:
            metadata.append((CERTIFIED_NAME, name.encode()))
        return tuple(metadata)

    def client(self, request: Request) -> AsyncClient:
        """Returns a client that calls on behalf of a request's caller."""
        return self._client.with_metadata(*request.state.caller)

    def has_accepted(self, caller: Metadata) -> bool:
        """Whether the server has accepted a caller and not refused it since."""
        return caller in self._known

    async def server(self, caller: Metadata, timeout_s: float = _TIMEOUT_S) -> KnownServer:
        """Returns the server, unless it refuses the caller. Raises MptGrpcError.

        Remembered for a few seconds, since it costs two calls and changes only if the server is restarted.
        """
        known, expires_s = self._known.get(caller, (None, 0.0))
        if known is not None and time.monotonic() < expires_s:
            return known
        client = self._client.with_metadata(*caller)
        try:
            limits = (await client.get_server_info(timeout=timeout_s)).limits
            model = await client.get_model_info(timeout=timeout_s)
        except (UnauthenticatedError, PermissionDeniedError):
            self._known.pop(caller, None)
            raise
        known = KnownServer(model.name, limits.max_running_requests + limits.max_waiting_requests)
        self._known.pop(caller, None)
        self._known[caller] = known, time.monotonic() + _LIFETIME_S
        if len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)
        return known


class CallerMiddleware:
    """Refuses callers whom the gRPC server refuses, before anything else of their requests is read."""

    def __init__(self, app: ASGIApp, callers: Callers) -> None:
        self._app, self._callers = app, callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            scope["state"]["caller"] = self._callers.metadata(scope)
            if (error := await self._refusal(scope["state"]["caller"], scope["path"])) is not None:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _refusal(self, caller: Metadata, path: str) -> MptGrpcError | None:
        timeout_s = _METRICS_TIMEOUT_S if path == METRICS_PATH else _TIMEOUT_S
        try:
            await self._callers.server(caller, timeout_s)
        except (UnauthenticatedError, PermissionDeniedError) as error:
            return error
        except MptGrpcError as error:
            # The pages are served without the server, and requests to it report the error.
            return error if path == METRICS_PATH and not self._callers.has_accepted(caller) else None
        return None


def bearer(authorization: str) -> str:
    """Returns the header that the gRPC server expects. Browsers ask for a password, which is the token, and send it as
    'Basic', in Base64 after a user name and a colon."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        return f"Bearer {base64.b64decode(credentials).decode().partition(':')[2]}"
    except ValueError:
        return authorization
