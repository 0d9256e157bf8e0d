"""The interceptor of all calls: identifies the caller and checks its roles, adds a server span to the caller's trace,
logs and measures it, and maps errors to statuses."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from opentelemetry.trace import Span, SpanKind

from mpt_grpc.access import Access, check_role
from mpt_grpc.caller import ANONYMOUS, Caller, Role
from mpt_grpc.errors import FieldViolation, InternalError, InvalidRequestError, MptServerError, UnauthenticatedError
from mpt_grpc.server import status
from mpt_grpc.server.call import Call, begin_call, current_call
from mpt_grpc.server.message_work import MessageWork
from mpt_grpc.server.serialization import encoded
from mpt_grpc.server.sizes import MessageLimits
from mpt_grpc.server.writes import PendingWrites
from mpt_grpc.telemetry import names
from mpt_grpc.telemetry.observer import Telemetry
from mpt_grpc.telemetry.propagation import callers_context
from mpt_grpc.turnstile import Turnstile
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1alpha1 import debug_pb2

_SERVICES: Mapping[str, ServiceDescriptor] = {
    service.full_name: service
    for module in (pb, debug_pb2, health_pb2, reflection_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
}
SERVICE, DEBUG_SERVICE, _HEALTH, _REFLECTION = _SERVICES
_log = logging.getLogger(__name__)
_ROLES: Mapping[str, tuple[Role, ...]] = {
    "Generate": (Role.GENERATE,),
    "StreamGenerate": (Role.GENERATE,),
    "Tokenize": (Role.GENERATE,),
    "Detokenize": (Role.GENERATE,),
    "Cancel": (Role.GENERATE, Role.ADMIN),
    "GetEngineState": (Role.OBSERVE,),
    "GetModelInfo": tuple(Role),
    "GetServerInfo": tuple(Role),
    "ServerReflectionInfo": tuple(Role),
}
"""The roles of which a caller needs one, by method. No other method can be called, except health."""
_NAMES = ("peer_dns", "peer_email", "peer_uri", "peer_ip")
"""The kinds of alternative names in certificates by which callers are known."""

# grpc.aio's types describe the messages of one method; an interceptor handles those of all methods.
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_CallContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Serving: TypeAlias = Callable[[_CallContext], AbstractAsyncContextManager[None]]
_Parse: TypeAlias = Callable[[bytes], Awaitable[Any]]
_Encode: TypeAlias = Callable[[Any], Awaitable[Any]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of all services; of health, only the parsing of messages."""

    message_limits: MessageLimits
    telemetry: Telemetry
    """Both are to be set before the server starts."""
    writes: PendingWrites
    """The streams that wait for their callers to read."""
    messages: MessageWork

    def __init__(self, access: Access) -> None:
        self._arrivals, self._departures = Turnstile(), Turnstile()
        self.writes, self.messages = PendingWrites(), MessageWork()
        self._access = access

    def hasten(self) -> None:
        """Has calls that are cancelled recorded at once from now on, and those that wait for it in the next turn."""
        self._departures.open()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.removeprefix("/")
        service, _, name = method.partition("/")
        if handler is None:
            return None
        assert handler.request_deserializer is not None
        # Messages are parsed where errors become statuses, and not by gRPC, which would report UNKNOWN.
        parse = partial(self._parse, _SERVICES[service].methods_by_name[name], handler.request_deserializer)
        if service == _HEALTH:
            return _health(parse, handler)
        metadata = handler_call_details.invocation_metadata or ()
        authorization = next((str(value) for key, value in metadata if key == "authorization"), None)
        try:
            serving = partial(self._serving, method, self._access.token_caller(authorization))
        except UnauthenticatedError as error:
            # A handler for streamed requests is called before the message has been received.
            return grpc.stream_stream_rpc_method_handler(
                _refusal(partial(self._serving, method, ANONYMOUS), str(error))
            )
        if service == _REFLECTION:
            return _reflection(serving, parse, handler)
        encode = partial(encoded, handler.response_serializer)
        if handler.unary_stream is not None:
            stream = _stream(serving, parse, handler.unary_stream, encode, self.writes)
            return grpc.unary_stream_rpc_method_handler(stream)
        assert handler.unary_unary is not None
        return grpc.unary_unary_rpc_method_handler(_unary(serving, parse, handler.unary_unary, encode))

    async def _parse(self, method: MethodDescriptor, parse: Callable[[bytes], Any], data: bytes) -> Any:
        """Returns the message. Raises InvalidRequestError."""
        return await self.messages.run(lambda: self._parsed(method, parse, data), len(data))

    def _parsed(self, method: MethodDescriptor, parse: Callable[[bytes], Any], data: bytes) -> Any:
        try:
            self.message_limits.check(data, method)
            return parse(data)
        except DecodeError as error:
            why = "not a valid request message of this method"
            raise InvalidRequestError(FieldViolation("request", why)) from error

    @asynccontextmanager
    async def _serving(self, method: str, caller: Caller | None, context: _CallContext) -> AsyncIterator[None]:
        """Serves a call inside the block. `caller` is None if its certificate identifies it."""
        # Read now: grpc crashes if the peer of a cancelled call is read at its end.
        peer = context.peer()
        caller = caller or self._access.certified_caller(_certified_name(context.auth_context()))
        call = Call(method, peer, self._start_span(method, caller, context), caller, context.time_remaining())
        begin_call(call)
        metrics = self.telemetry.metrics
        try:
            await self._arrivals.wait()
            check_role(caller, _ROLES[method.rpartition("/")[2]])
            yield
        except MptServerError as error:
            failure = error
        except (asyncio.CancelledError, GeneratorExit):
            call.cancel()
            try:
                await self._departures.wait()  # a connection that closes cancels all of its calls at once
            finally:
                call.record(metrics)
            raise
        except Exception:
            _log.exception("%s failed", method)
            failure = InternalError("internal error; see the server's log for details")
        else:
            call.end()
            call.record(metrics)
            return
        # gRPC keeps the exception of a status, and with it these frames and their messages, until garbage is collected.
        traceback.clear_frames(failure.__traceback__)
        call.fail(failure)
        call.record(metrics)
        await status.abort(context, failure, call.error_details)

    def _start_span(self, method: str, caller: Caller, context: _CallContext) -> Span | None:
        if self.telemetry.tracer is None:
            return None
        named = {names.CALLER: caller.name} if caller.name else {}
        span = self.telemetry.tracer.start_span(
            method,
            context=callers_context(context.invocation_metadata() or ()),
            kind=SpanKind.SERVER,
            attributes={names.RPC_SYSTEM: "grpc", names.RPC_METHOD: method, **named},
        )
        return span if span.is_recording() else None


def _unary(serving: _Serving, parse: _Parse, serve: Callable[..., Any], encode: _Encode) -> Callable[..., Any]:
    async def unary(data: bytes, context: _CallContext) -> Any:
        async with serving(context):
            current_call().num_bytes = len(data)
            response = serve(await parse(data), context)
            del data  # this frame is part of a status that gRPC keeps
            return await encode(await response)

    return unary


def _stream(
    serving: _Serving, parse: _Parse, serve: Callable[..., Any], encode: _Encode, writes: PendingWrites
) -> Callable[..., Any]:
    async def stream(data: bytes, context: _CallContext) -> AsyncIterator[Any]:
        task = asyncio.current_task()
        assert task is not None
        async with serving(context):
            call = current_call()
            call.num_bytes = len(data)
            async with aclosing(serve(await parse(data), context)) as responses:
                del data
                try:
                    async for response in responses:
                        writes.begin(task, context, call)
                        yield await encode(response)
                        writes.end(task)
                finally:
                    writes.end(task)

    return stream


def _health(parse: _Parse, handler: _Handler) -> _Handler:
    """Returns the handler of a method of health, which needs no role and leaves no trace."""
    if handler.unary_stream is not None:
        watch: Callable[..., Any] = handler.unary_stream

        async def stream(data: bytes, context: _CallContext) -> AsyncIterator[Any]:
            async with _statuses(context), aclosing(watch(await parse(data), context)) as responses:
                del data  # a watch lasts as long as its caller
                async for response in responses:
                    yield response

        return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)
    check: Callable[..., Any] = handler.unary_unary  # type: ignore[assignment]

    async def unary(data: bytes, context: _CallContext) -> Any:
        async with _statuses(context):
            return await check(await parse(data), context)

    return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)


@asynccontextmanager
async def _statuses(context: _CallContext) -> AsyncIterator[None]:
    try:
        yield
    except MptServerError as error:
        await status.abort(context, error)


def _reflection(serving: _Serving, parse: _Parse, handler: _Handler) -> _Handler:
    """Returns the handler of reflection, the only method whose requests are a stream."""
    reflect: Callable[..., Any] = handler.stream_stream  # type: ignore[assignment]

    async def stream(messages: Any, context: _CallContext) -> AsyncIterator[Any]:
        requests = (await parse(data) async for data in messages)
        async with serving(context), aclosing(requests), aclosing(reflect(requests, context)) as responses:
            async for response in responses:
                yield response

    return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)


def _refusal(serving: _Serving, why: str) -> Callable[..., Any]:
    async def stream(_requests: Any, context: _CallContext) -> AsyncIterator[bytes]:
        async with serving(context):
            raise UnauthenticatedError(why)
        yield b""

    return stream


def _certified_name(identity: Mapping[str, Iterable[bytes]]) -> str | None:
    """Returns the name in a client's certificate, as `mpt_grpc.tls.subject_name` does; None without a certificate."""
    if "x509_common_name" not in identity:
        return None
    known = {name for kind in _NAMES for name in identity.get(kind, ())}  # all others have the same text
    alternatives = (name for name in identity.get("x509_subject_alternative_name", ()) if name in known)
    names = (*identity["x509_common_name"], *alternatives)
    return next((name.decode(errors="replace") for name in names if name), "")
