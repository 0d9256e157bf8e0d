"""The interceptor of all calls: adds a server span to the caller's trace, logs a line, and maps errors to statuses."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mpt_grpc.errors import FieldViolation, InternalError, InvalidRequestError, MptServerError
from mpt_grpc.server import status
from mpt_grpc.server.sizes import SMALL_MESSAGE_BYTES
from mpt_grpc.telemetry import names
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1alpha1 import debug_pb2

SERVICE = pb.DESCRIPTOR.services_by_name["TextGenerationService"].full_name
DEBUG_SERVICE = debug_pb2.DESCRIPTOR.services_by_name["DebugService"].full_name
_log = logging.getLogger("mpt_grpc.access")
_POLLED = ("GetEngineState", "GetModelInfo", "GetServerInfo")
_MAX_LOGGED_CHARACTERS = 300

# grpc.aio's types describe the messages of one method; an interceptor handles those of all methods.
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_CallContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass
class Call:
    """The call being served."""

    peer: str
    span: Span | None
    """None unless the server traces."""
    logged: dict[str, Any] = field(default_factory=dict)
    """What its line in the log contains in addition to the method, the status and the duration."""


_call: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """Returns the call that this coroutine serves."""
    return _call.get()


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of this project's services; health and reflection pass through unchanged."""

    def __init__(self, tracer: Tracer | None) -> None:
        self.max_message_bytes: Mapping[str, int] = {}
        """The size of the largest message of each method with long fields; to be set before the server starts."""
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.removeprefix("/")
        if handler is None or method.partition("/")[0] not in (SERVICE, DEBUG_SERVICE):
            return handler
        codecs = (self._parser(method, handler.request_deserializer), handler.response_serializer)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), *codecs)
        assert handler.unary_unary is not None
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), *codecs)

    def _parser(self, method: str, parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
        """Returns a parser whose failures are raised where errors become statuses; gRPC itself would report UNKNOWN."""
        assert parse is not None
        most = self.max_message_bytes.get(method.rpartition("/")[2], SMALL_MESSAGE_BYTES)

        def parse_or_error(data: bytes) -> Any:
            if len(data) > most:
                why = f"{len(data)} bytes; at most {most} are allowed"
                return InvalidRequestError(FieldViolation("request", why))
            try:
                return parse(data)
            except DecodeError:
                return InvalidRequestError(FieldViolation("request", "not a valid request message of this method"))

        return parse_or_error

    def _unary(self, method: str, serve: Callable[..., Any]) -> Callable[..., Any]:
        async def unary(request: Any, context: _CallContext) -> Any:
            async with self._serving(method, context):
                response = serve(_parsed(request), context)
                del request  # this frame is part of a status that gRPC keeps
                return await response

        return unary

    def _stream(self, method: str, serve: Callable[..., Any]) -> Callable[..., Any]:
        async def stream(request: Any, context: _CallContext) -> AsyncIterator[Any]:
            async with self._serving(method, context), aclosing(serve(_parsed(request), context)) as responses:
                del request
                async for response in responses:
                    yield response

        return stream

    @asynccontextmanager
    async def _serving(self, method: str, context: _CallContext) -> AsyncIterator[None]:
        # Read now: grpc crashes if the peer of a cancelled call is read at its end.
        call = Call(context.peer(), self._start_span(method, context))
        # Each call runs in a task of its own, so the variable need not be reset.
        _call.set(call)
        start_s = time.monotonic()
        code = grpc.StatusCode.OK
        try:
            yield
        except MptServerError as error:
            code, _ = status.code_and_reason(error)
            await self._fail(context, call, error)
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:
            _log.exception("%s failed", method)
            code = grpc.StatusCode.INTERNAL
            await self._fail(context, call, InternalError("internal error; see the server's log for details"))
        finally:
            _log_call(method.rpartition("/")[2], call, code, time.monotonic() - start_s)
            if call.span is not None:
                call.span.set_attribute(names.RPC_STATUS_CODE, code.name)
                call.span.end()

    def _start_span(self, method: str, context: _CallContext) -> Span | None:
        if self._tracer is None:
            return None
        carrier = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        return self._tracer.start_span(
            method,
            context=self._propagator.extract(carrier, context=Context()),
            kind=SpanKind.SERVER,
            attributes={names.RPC_SYSTEM: "grpc", names.RPC_METHOD: method},
        )

    @staticmethod
    async def _fail(context: _CallContext, call: Call, error: MptServerError) -> None:
        # gRPC keeps the exception of a status, and with it these frames and their messages, until garbage is collected.
        traceback.clear_frames(error.__traceback__)
        call.logged["error"] = str(error)
        if call.span is not None:
            call.span.set_attribute(names.ERROR_TYPE, status.code_and_reason(error)[1])
            call.span.set_status(StatusCode.ERROR, str(error))
        await status.abort(context, error)


def _log_call(method: str, call: Call, code: grpc.StatusCode, duration_s: float) -> None:
    level = logging.DEBUG if method in _POLLED and code is grpc.StatusCode.OK else logging.INFO
    if _log.isEnabledFor(level):
        details = "".join(f" {name}={_shortened(value)}" for name, value in call.logged.items())
        _log.log(level, "%s %s %.3f s peer=%s%s", method, code.name, duration_s, call.peer, details)


def _shortened(value: Any) -> str:
    """Returns the value on one line; text of callers is quoted, so that it cannot forge a line of the log."""
    return repr(value[:_MAX_LOGGED_CHARACTERS]) if isinstance(value, str) else str(value)


def _parsed(request: Any) -> Any:
    if isinstance(request, MptServerError):
        raise request
    return request
