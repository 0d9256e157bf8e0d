"""A channel to a server on the same event loop: calls without a connection, whose responses are passed as objects.

Requests are serialized and parsed as over a connection, so that the server's limits on their bytes hold. A handler runs
in a task of its own, as in grpc.aio, is at most two responses ahead of its reader, and gets nothing of its caller's
context but the metadata.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn, Self, TypeAlias

import grpc
from grpc.aio import EOF, Metadata, UsageError

from mpt_grpc.access import CERTIFIED_NAME

_log = logging.getLogger(__name__)
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class LocalChannel(grpc.aio.Channel):
    """A channel to the services that are added to it, as to a grpc.aio.Server; for unary requests only."""

    def __init__(self, interceptor: grpc.aio.ServerInterceptor) -> None:
        self._interceptor = interceptor
        self._services: list[grpc.GenericRpcHandler] = []
        self._calls: dict[asyncio.Task[None], _Context] = {}
        self._is_closed = False

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Adds services; called by `add_..._to_server` of the generated code."""
        self._services += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, _Handler]) -> None:
        """Does nothing: the handlers are among the generic ones."""

    def unary_unary(self, method: str, request_serializer: Any = None, *_: Any, **__: Any) -> Any:
        return partial(self._call, method, request_serializer)

    unary_stream = unary_unary

    def stream_unary(self, *_: Any, **__: Any) -> Any:
        return _refuse_streamed_requests

    stream_stream = stream_unary

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: ARG002
        return grpc.ChannelConnectivity.SHUTDOWN if self._is_closed else grpc.ChannelConnectivity.READY

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        raise NotImplementedError("the state changes only when the channel is closed")

    async def channel_ready(self) -> None:
        """Returns at once."""

    async def close(self, grace: float | None = None) -> None:
        """Cancels the calls that are still in progress after `grace` seconds, and waits until their handlers end."""
        self._is_closed = True
        if self._calls:
            _, remaining = await asyncio.wait(self._calls, timeout=grace or 0)
            for task in remaining:
                self._calls[task].cancel(_CANCELLED)
            await asyncio.gather(*remaining, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _call(
        self,
        method: str,
        serialize: Callable[[Any], bytes] | None,
        request: Any,
        *,
        timeout: float | None = None,
        metadata: Iterable[tuple[str, str | bytes]] | None = None,
        **_: Any,
    ) -> _Call:
        """Starts a call. Credentials, compression and waiting for a connection have no meaning here."""
        if self._is_closed:
            raise UsageError("Channel is closed.")
        context = _Context(timeout, Metadata(*(metadata or ())))
        serving = self._serve(method, _coded(request, serialize), context)
        context.task = asyncio.get_running_loop().create_task(serving, context=contextvars.Context())
        self._calls[context.task] = context
        context.task.add_done_callback(self._calls.pop)
        return _Call(context)

    async def _serve(self, method: str, data: bytes, context: _Context) -> None:
        """Runs the handler of a call, and ends the call with its status."""
        try:
            details = _CallDetails(method, context.invocation_metadata())
            handler: Any = await self._interceptor.intercept_service(self._find, details)
            if handler is None:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            request = _coded(data, handler.request_deserializer)
            # An interceptor may refuse a call with a handler for streamed requests.
            if (stream := handler.unary_stream or handler.stream_stream) is None:
                await context.write(await handler.unary_unary(request, context))
            else:
                async with aclosing(stream(request, context)) as responses:
                    async for response in responses:
                        await context.write(response)
        except grpc.aio.AbortError:
            pass  # the context has the status
        except asyncio.CancelledError:
            context.set_code(grpc.StatusCode.CANCELLED)
            raise
        except Exception as error:
            _log.exception("%s failed", method)
            context.set_code(grpc.StatusCode.UNKNOWN)
            context.set_details(f"Unexpected {type(error)}: {error}")
        finally:
            context.end(_Status(context.code(), context.details(), context.trailing_metadata()))

    async def _find(self, details: grpc.HandlerCallDetails) -> _Handler | None:
        return next((handler for service in self._services if (handler := service.service(details))), None)


def _coded(message: Any, codec: Callable[[Any], Any] | None) -> Any:
    return message if codec is None else codec(message)


def _refuse_streamed_requests(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("methods with streamed requests are not supported")


@dataclass
class _CallDetails:
    method: str
    invocation_metadata: Any


class _Status(NamedTuple):
    code: grpc.StatusCode
    details: str
    trailing_metadata: Metadata = Metadata()


_CANCELLED = _Status(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")
_EXPIRED = _Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


class _Context(grpc.aio.ServicerContext[Any, Any]):
    """The state of a call: what its handler sees, and what its caller waits for."""

    task: asyncio.Task[None]
    """Runs the handler."""

    def __init__(self, timeout: float | None, metadata: Metadata) -> None:
        loop = asyncio.get_running_loop()
        self.response: Any = EOF
        """A response that the caller has not read, or EOF."""
        self._loop = loop
        self._change: asyncio.Future[None] | None = None
        """What the caller waits for while there is no response, or the handler while there is one."""
        self.initial_metadata: asyncio.Future[Metadata] = loop.create_future()
        self.status: asyncio.Future[_Status] = loop.create_future()
        self._metadata, self._own_status = metadata, _Status(grpc.StatusCode.OK, "")
        self._timer = None if timeout is None else loop.call_later(timeout, self.cancel, _EXPIRED)

    def end(self, status: _Status) -> bool:
        """Ends the call for its caller, who still gets the response that was not read; False if it had ended."""
        if self.status.done():
            return False
        self.status.set_result(status)
        if self._timer is not None:
            self._timer.cancel()
        if not self.initial_metadata.done():
            self.initial_metadata.set_result(Metadata())
        self._signal_change()
        return True

    def cancel(self, status: _Status) -> bool:
        """Ends the call with this status and cancels its handler; False if it had ended."""
        return self.end(status) and self.task.cancel()

    async def write(self, message: Any) -> None:
        while self.response is not EOF and not self.status.done():
            await self._wait_for_change()
        if self.status.done():
            raise asyncio.CancelledError
        self.response = message
        self._signal_change()
        if not self.initial_metadata.done():
            self.initial_metadata.set_result(Metadata())

    async def next_response(self) -> Any:
        """Returns the next response when there is one, or EOF at the end of the call."""
        while self.response is EOF and not self.status.done():
            await self._wait_for_change()
        response, self.response = self.response, EOF
        self._signal_change()
        return response

    async def _wait_for_change(self) -> None:
        self._change = self._loop.create_future()
        await self._change

    def _signal_change(self) -> None:
        if self._change is not None and not self._change.done():
            self._change.set_result(None)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[Any] = ()) -> NoReturn:
        self._own_status = _Status(code, details, Metadata(*trailing_metadata))
        raise grpc.aio.AbortError

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    async def send_initial_metadata(self, initial_metadata: Iterable[Any]) -> None:
        self.initial_metadata.set_result(Metadata(*initial_metadata))

    def set_trailing_metadata(self, trailing_metadata: Iterable[Any]) -> None:
        self._own_status = self._own_status._replace(trailing_metadata=Metadata(*trailing_metadata))

    def set_code(self, code: grpc.StatusCode) -> None:
        self._own_status = self._own_status._replace(code=code)

    def set_details(self, details: str) -> None:
        self._own_status = self._own_status._replace(details=details)

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def time_remaining(self) -> Any:
        """Returns the time to the deadline in seconds, or None without one."""
        return None if self._timer is None else max(0.0, self._timer.when() - asyncio.get_running_loop().time())

    def peer(self) -> str:
        return "inproc"

    def peer_identities(self) -> None:
        return None

    def peer_identity_key(self) -> None:
        return None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Returns the name in the certificate of the HTTP caller, as grpc would that of its own caller."""
        name = self._metadata.get(CERTIFIED_NAME, b"")
        return {"x509_common_name": [name if isinstance(name, bytes) else name.encode()]}

    def code(self) -> grpc.StatusCode:
        return self._own_status.code

    def details(self) -> str:
        return self._own_status.details

    def trailing_metadata(self) -> Metadata:
        return self._own_status.trailing_metadata

    def cancelled(self) -> bool:
        return self.done() and self.status.result().code is grpc.StatusCode.CANCELLED

    def done(self) -> bool:
        return self.status.done()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.status.add_done_callback(lambda _: callback(self))

    async def read(self) -> NoReturn:
        raise UsageError("the request is the handler's first argument")

    def set_compression(self, compression: grpc.Compression) -> None:
        """Does nothing: responses are not encoded."""

    def disable_next_message_compression(self) -> None:
        """Does nothing: responses are not encoded."""


class _Call(grpc.aio.UnaryUnaryCall[Any, Any], grpc.aio.UnaryStreamCall[Any, Any]):
    """A call as its caller sees it, with one response or a stream of them."""

    def __init__(self, context: _Context) -> None:
        self._context = context

    def __await__(self) -> Generator[Any, None, Any]:
        return self.read().__await__()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if (response := await self.read()) is EOF:
            raise StopAsyncIteration
        return response

    async def read(self) -> Any:
        """Returns the next response, or EOF. Raises AioRpcError, and CancelledError after `cancel`."""
        context = self._context
        try:
            response = await context.next_response()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if context.done() and context.status.result() is _CANCELLED:
            raise asyncio.CancelledError
        if response is EOF and (status := context.status.result()).code is not grpc.StatusCode.OK:
            initial = context.initial_metadata.result()
            raise grpc.aio.AioRpcError(status.code, initial, status.trailing_metadata, status.details)
        return response

    def cancel(self) -> bool:
        return self._context.cancel(_CANCELLED)

    def cancelled(self) -> bool:
        return self._context.cancelled()

    def done(self) -> bool:
        return self._context.done()

    def time_remaining(self) -> Any:
        return self._context.time_remaining()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._context.status.add_done_callback(lambda _: callback(self))

    async def initial_metadata(self) -> Metadata:
        return await asyncio.shield(self._context.initial_metadata)

    async def trailing_metadata(self) -> Metadata:
        return (await asyncio.shield(self._context.status)).trailing_metadata

    async def code(self) -> grpc.StatusCode:
        return (await asyncio.shield(self._context.status)).code

    async def details(self) -> str:
        return (await asyncio.shield(self._context.status)).details

    async def wait_for_connection(self) -> None:
        """Returns at once."""
