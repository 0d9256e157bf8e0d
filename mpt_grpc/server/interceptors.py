"""What every call of the service passes through: a server span from the caller's context, and errors to status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mpt_grpc.errors import FieldViolation, InternalError, InvalidRequestError, MptGrpcError
from mpt_grpc.server import status
from mpt_grpc.telemetry import names

_SERVICE = "mpt.v1.TextGenerationService"
_log = logging.getLogger(__name__)
_span: ContextVar[Span | None] = ContextVar("rpc_span", default=None)

# grpc.aio's types name the messages of one method; an interceptor sees those of all.
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_CallContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def current_span() -> Span | None:
    """The span of the call that this coroutine serves; None when nothing is traced."""
    return _span.get()


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of TextGenerationService; health and reflection pass untouched."""

    def __init__(self, tracer: Tracer | None) -> None:
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.removeprefix("/").partition("/")
        if service != _SERVICE or handler is None:
            return handler
        codecs = (_parser(handler.request_deserializer), handler.response_serializer)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), *codecs)
        assert handler.unary_unary is not None
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), *codecs)

    def _unary(self, method: str, serve: Callable[..., Any]) -> Callable[..., Any]:
        async def unary(request: Any, context: _CallContext) -> Any:
            async with self._call(method, context):
                return await serve(_parsed(request), context)

        return unary

    def _stream(self, method: str, serve: Callable[..., Any]) -> Callable[..., Any]:
        async def stream(request: Any, context: _CallContext) -> AsyncIterator[Any]:
            async with self._call(method, context):
                async for response in serve(_parsed(request), context):
                    yield response

        return stream

    @asynccontextmanager
    async def _call(self, method: str, context: _CallContext) -> AsyncIterator[None]:
        span = self._start_span(method, context)
        code = grpc.StatusCode.OK
        try:
            yield
        except MptGrpcError as error:
            code, _ = status.code_and_reason(error)
            await self._fail(context, span, error)
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception:
            _log.exception("%s failed", method)
            code = grpc.StatusCode.INTERNAL
            await self._fail(context, span, InternalError("the server failed; its log says why"))
        finally:
            if span is not None:
                span.set_attribute(names.RPC_STATUS_CODE, code.name)
                span.end()

    def _start_span(self, method: str, context: _CallContext) -> Span | None:
        if self._tracer is None:
            return None
        carrier = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        span = self._tracer.start_span(
            f"{_SERVICE}/{method}",
            context=self._propagator.extract(carrier, context=Context()),
            kind=SpanKind.SERVER,
            attributes={names.RPC_SYSTEM: "grpc", names.RPC_METHOD: f"{_SERVICE}/{method}"},
        )
        # Each call runs in a task of its own, so that the variable needs no reset.
        _span.set(span)
        return span

    @staticmethod
    async def _fail(context: _CallContext, span: Span | None, error: MptGrpcError) -> None:
        if span is not None:
            span.set_attribute(names.ERROR_TYPE, status.code_and_reason(error)[1])
            span.set_status(StatusCode.ERROR, str(error))
        await status.abort(context, error)


def _parser(parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Hands what cannot be parsed on as an error, to be raised where errors become status: gRPC would say UNKNOWN."""
    assert parse is not None

    def parse_or_fault(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return InvalidRequestError(FieldViolation("request", "these bytes are no message of this method"))

    return parse_or_fault


def _parsed(request: Any) -> Any:
    if isinstance(request, MptGrpcError):
        raise request
    return request
