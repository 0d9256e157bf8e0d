"""OpenTelemetry's spans of calls, and the trace context that calls send.

Without OpenTelemetry's SDK in the program, nothing is recorded, and calls send the context of the caller, if any.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from opentelemetry import propagate, trace

from mpt_grpc_client.errors import MptGrpcError
from mpt_grpc_client.metadata import Metadata
from mpt_grpc_client.version import __version__


class CallSpan:
    """The span of one call from its first attempt to its end, whichever servers it is sent to."""

    def __init__(self, request: Message, *, streams: bool = False, on_end: Callable[[], None] = lambda: None) -> None:
        """streams: whether the request is that of the method that streams its response.

        on_end: is called when the call ends, perhaps more than once.
        """
        self._on_end = on_end
        method = _method(request.DESCRIPTOR, streams)
        self._span = trace.get_tracer("mpt_grpc_client", __version__).start_span(
            method, kind=trace.SpanKind.CLIENT, attributes={"rpc.system.name": "grpc", "rpc.method": method}
        )

    def metadata(self) -> Metadata:
        """Returns the trace context: `traceparent` by default; empty outside of a trace."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(self._span))
        return tuple((key.lower(), value) for key, value in carrier.items())

    def add_attempt(self, target: str, failure: MptGrpcError) -> None:
        """Records that the call is tried again after a failure."""
        self._span.add_event("attempt failed", {"server.address": target, "exception.message": str(failure)})

    def fail(self, error: BaseException) -> None:
        """Ends the span with what ends the call: an error, or the cancellation of its task."""
        if not isinstance(error, Exception):
            self.end("CANCELLED")
            return
        code, reason = (error.code.name, error.reason) if isinstance(error, MptGrpcError) else ("UNKNOWN", "")
        self._span.set_attribute("error.type", reason or type(error).__name__)
        self._span.set_status(trace.StatusCode.ERROR, str(error))
        self.end(code)

    def end(self, code: str = "OK") -> None:
        """Ends the span with the code of gRPC. Has no effect once it has ended."""
        self._on_end()
        if self._span.is_recording():
            self._span.set_attribute("rpc.response.status_code", code)
            self._span.end()


@cache
def _method(request: Descriptor, streams: bool) -> str:
    """Returns the full name of the method that takes the message, as `package.Service/Method`."""
    services = request.file.services_by_name.values()
    methods = ((service, method) for service in services for method in service.methods)
    return next(
        f"{service.full_name}/{method.name}"
        for service, method in methods
        if method.input_type is request and method.server_streaming is streams
    )
