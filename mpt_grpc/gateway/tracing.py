"""The spans of HTTP requests, and the trace that calls to the gRPC server belong to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from opentelemetry import context as trace_context
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, StatusCode, Tracer, format_trace_id, set_span_in_context
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpt_grpc.telemetry import names
from mpt_grpc.telemetry.propagation import callers_context

_TRACED_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


class TraceMiddleware:
    """Makes the calls for a request part of its caller's trace, and records a span of each generation."""

    def __init__(self, app: ASGIApp, tracer: Tracer | None) -> None:
        """tracer: None records no spans."""
        self._app, self._tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _TRACED_PATHS:
            await self._app(scope, receive, send)
            return
        context = callers_context(Headers(scope=scope).items())
        if self._tracer is None:
            with _attached(context):
                await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        span = self._tracer.start_span(
            f"{method} {path}",
            context,
            SpanKind.SERVER,
            {
                names.HTTP_METHOD: method,
                names.HTTP_ROUTE: path,
                names.URL_PATH: path,
                names.URL_SCHEME: scope["scheme"],
                names.REQUEST_ID: scope["state"]["request_id"],
            },
        )

        if span.is_recording():
            scope["state"]["trace_id"] = format_trace_id(span.get_span_context().trace_id)

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute(names.HTTP_STATUS_CODE, message["status"])
                if message["status"] >= 500:
                    span.set_attribute(names.ERROR_TYPE, str(message["status"]))
                    span.set_status(StatusCode.ERROR)
            await send(message)

        try:
            with _attached(set_span_in_context(span, context)):
                await self._app(scope, receive, send_and_note)
        finally:
            span.end()


@contextlib.contextmanager
def _attached(context: Context) -> Iterator[None]:
    token = trace_context.attach(context)
    try:
        yield
    finally:
        trace_context.detach(token)
