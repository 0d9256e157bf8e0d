"""A channel to a server on the same event loop: calls without a connection, whose responses are passed as objects.

Requests are serialized and parsed as over a connection, so that the server's limits on their bytes hold. A handler runs
in a task of its own, as in grpc.aio, is at most two responses ahead of its reader, and gets nothing of its caller's
context but the metadata.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias

import grpc
from grpc.aio import Metadata, UsageError

from mpt_grpc.server.local_call import CANCELLED, Call, CallContext, Status

_log = logging.getLogger(__name__)
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class LocalChannel(grpc.aio.Channel):
    """A channel to the services that are added to it, as to a grpc.aio.Server; for unary requests only."""

    def __init__(self, interceptor: grpc.aio.ServerInterceptor) -> None:
        self._interceptor = interceptor
        self._services: list[grpc.GenericRpcHandler] = []
        self._calls: dict[asyncio.Task[None], CallContext] = {}
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
                self._calls[task].cancel(CANCELLED)
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
    ) -> Call:
        """Starts a call. Credentials, compression and waiting for a connection have no meaning here."""
        if self._is_closed:
            raise UsageError("Channel is closed.")
        context = CallContext(timeout, Metadata(*(metadata or ())))
        serving = self._serve(method, _coded(request, serialize), context)
        context.task = asyncio.get_running_loop().create_task(serving, context=contextvars.Context())
        self._calls[context.task] = context
        context.task.add_done_callback(self._calls.pop)
        return Call(context)

    async def _serve(self, method: str, data: bytes, context: CallContext) -> None:
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
            # Not raised again: the task would keep it, with these frames and the request, until garbage is collected.
            context.set_code(grpc.StatusCode.CANCELLED)
        except Exception as error:
            _log.exception("%s failed", method)
            context.set_code(grpc.StatusCode.UNKNOWN)
            context.set_details(f"Unexpected {type(error)}: {error}")
        finally:
            context.end(Status(context.code(), context.details(), context.trailing_metadata()))

    async def _find(self, details: grpc.HandlerCallDetails) -> _Handler | None:
        found: Iterator[Any] = (service.service(details) for service in self._services)
        handler = next(filter(None, found), None)
        return None if handler is None else handler._replace(response_serializer=None)


def _coded(message: Any, codec: Callable[[Any], Any] | None) -> Any:
    return message if codec is None else codec(message)


def _refuse_streamed_requests(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("methods with streamed requests are not supported")


@dataclass
class _CallDetails:
    method: str
    invocation_metadata: Any
