"""What applies to every HTTP request: its turn, sender, ID, headers, share of memory, and end in a shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import uuid
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpt_grpc.gateway.access_log import note_refusal
from mpt_grpc.gateway.errors import BadRequestError, error_response, shortened
from mpt_grpc.gateway.protocol import MAX_HEAD_BYTES
from mpt_grpc.turnstile import Turnstile
from mpt_grpc_client import OverloadedError, UnavailableError

MAX_HEADERS = 100
MAX_BODIES_BYTES = 128 << 20
SMALL_BODY_BYTES = 64 << 10
_CORRELATION_ID = re.compile(r"[!-~]{1,128}")
_MAX_PREFIX = 64
_HOST = re.compile(r"(\[[\w:.%~-]+]|[\w.~%!$&'()*+,;=-]*)(:\d*)?", re.ASCII)
"""The form of `Host`: a name or an address, with or without a port."""
_HEADERS = {
    # No external resources and no embedding in frames. The pages of `/docs` contain inline code.
    "content-security-policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_LAST_MESSAGE_TIMEOUT_S = 1


class ArrivalMiddleware:
    """Begins a few requests in each turn of the event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._turnstile = app, Turnstile()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._turnstile.wait()
        await self._app(scope, receive, send)


class HeaderMiddleware:
    """Refuses requests by their headers, and adds headers to all responses.

    hosts: the names accepted in `Host` in addition to those of the loopback interface; None accepts all.
    origins: the websites, besides the gateway's own pages, that may send requests; `*` stands for all.

    Without these checks, any website could use a server on the machine of its visitor: by sending a request that a
    browser does not ask about first, or by a name of its own that resolves to this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str]) -> None:
        self._app, self._origins = app, origins
        self._hosts = hosts if hosts is None else {"localhost", socket.gethostname().lower(), *map(str.lower, hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        correlation_id, request_id = headers.get("x-request-id", ""), uuid.uuid4().hex
        if _CORRELATION_ID.fullmatch(correlation_id):
            # The engine's ID is unique, and its beginning leads from the server's logs and traces to the caller's.
            request_id = f"{correlation_id[:_MAX_PREFIX]}-{request_id[:12]}"
        else:
            correlation_id = request_id
        scope["state"]["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                for name, value in {**_HEADERS, "x-request-id": correlation_id}.items():
                    own.setdefault(name, value)
            await send(message)

        error = self._refusal(headers, scope["http_version"])
        if error is None:
            await self._app(scope, receive, send_with_headers)
            return
        note_refusal(scope, error)
        await error_response(error)(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers, http_version: str) -> BadRequestError | None:
        size = sum(len(name) + len(value) for name, value in headers.raw)
        if size > MAX_HEAD_BYTES or len(headers.raw) > MAX_HEADERS:
            why = f"the headers exceed {MAX_HEAD_BYTES >> 10} KiB or number more than {MAX_HEADERS}; send fewer"
            return BadRequestError(why, status=431)
        hosts = headers.getlist("host")
        if len(hosts) > 1 or (not hosts and http_version != "1.0"):
            return BadRequestError(f"{len(hosts)} Host headers; send one")
        for host in hosts:
            if not _HOST.fullmatch(host):
                why = f"the host {shortened(host)!r} is neither a name nor an address, with or without a port"
                return BadRequestError(why)
            if not self._is_host_allowed(host):
                why = f"the host {shortened(host)!r} is not a name of this machine; allow it with --allow-host"
                return BadRequestError(why, status=403)
        for origin in headers.getlist("origin"):
            if not self._is_origin_allowed(origin, headers.get("host")):
                why = f"requests from the website {shortened(origin)!r} are not allowed; allow them with --allow-origin"
                return BadRequestError(why, status=403)
        return None

    def _is_host_allowed(self, host: str) -> bool:
        if self._hosts is None:
            return True
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name.rstrip(".") in self._hosts or ipaddress.ip_address(name).is_loopback
        except ValueError:  # neither a name nor an address
            return False

    def _is_origin_allowed(self, origin: str, host: str | None) -> bool:
        own = (f"http://{host}", f"https://{host}") if host else ()
        return "*" in self._origins or origin.lower() in (*self._origins, *map(str.lower, own))


class PathMiddleware:
    """Serves a path with slashes at its end like the path without them.

    A redirection would lose the body of a request in some clients, and the scheme behind a proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["path"].rstrip("/") or "/"
        await self._app(scope, receive, send)


class BodyMemoryMiddleware:
    """Refuses to read bodies beyond what those of all requests may hold together until their responses begin.

    A body's first `SMALL_BODY_BYTES` do not count, so that small requests are served while large ones are refused.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODIES_BYTES) -> None:
        self._app, self._free_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_received = num_held = 0

        async def receive_within_budget() -> Message:
            nonlocal num_received, num_held
            message = await receive()
            num_received += len(message.get("body", b""))
            more = max(0, num_received - SMALL_BODY_BYTES) - num_held
            if more > self._free_bytes:
                raise OverloadedError("too many large requests are in progress: retry later", retry_after=1)
            self._free_bytes -= more
            num_held += more
            return message

        def release() -> None:
            nonlocal num_received, num_held
            self._free_bytes += num_held
            num_received = num_held = 0

        async def send_and_release(message: Message) -> None:
            if message["type"] == "http.response.start":
                release()
            await send(message)

        try:
            await self._app(scope, receive_within_budget, send_and_release)
        finally:
            release()


class GracePeriodMiddleware:
    """Ends the requests that are in progress at the end of the grace period of a shutdown with an error."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._requests: set[asyncio.Timeout] = set()
        self._has_ended = False

    def end(self) -> None:
        """Ends all requests in progress, and those that still arrive."""
        self._has_ended = True
        for request in self._requests:
            request.reschedule(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        response = _Response(send)
        request = asyncio.timeout(0 if self._has_ended else None)
        try:
            async with request:
                self._requests.add(request)
                try:
                    await self._app(scope, receive, response.send)
                finally:
                    self._requests.discard(request)
        except TimeoutError:
            if not request.expired():
                raise
            # A caller who does not read must not delay the end.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_MESSAGE_TIMEOUT_S):
                    await response.fail(scope, receive)


class _Response:
    """A response, which can be ended with an error."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._is_complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif not message.get("more_body"):
            self._is_complete = True
        await self._send(message)

    async def fail(self, scope: Scope, receive: Receive) -> None:
        """Sends an error as the response, or as the last event of a stream that has begun."""
        error = UnavailableError("the server is shutting down")
        if self._start is None:
            await error_response(error)(scope, receive, self.send)
        elif not self._is_complete and b"text/event-stream" in dict(self._start["headers"]).get(b"content-type", b""):
            await self.send({"type": "http.response.body", "body": scope["state"]["failure_event"](error)})
