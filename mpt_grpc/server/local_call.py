"""A call of a local channel, as its handler sees it and as its caller does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn, Self

import grpc
from grpc.aio import EOF, Metadata, UsageError

from mpt_grpc.access import CERTIFIED_NAME


class Status(NamedTuple):
    code: grpc.StatusCode
    details: str
    trailing_metadata: Metadata = Metadata()


CANCELLED = Status(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")
_EXPIRED = Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


class CallContext(grpc.aio.ServicerContext[Any, Any]):
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
        self.status: asyncio.Future[Status] = loop.create_future()
        self._metadata, self._own_status = metadata, Status(grpc.StatusCode.OK, "")
        self._timer = None if timeout is None else loop.call_later(timeout, self.cancel, _EXPIRED)

    def end(self, status: Status) -> bool:
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

    def cancel(self, status: Status) -> bool:
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
        self._own_status = Status(code, details, Metadata(*trailing_metadata))
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
        name = self._metadata.get(CERTIFIED_NAME)
        return {} if name is None else {"x509_common_name": [name if isinstance(name, bytes) else name.encode()]}

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


class Call(grpc.aio.UnaryUnaryCall[Any, Any], grpc.aio.UnaryStreamCall[Any, Any]):
    """A call as its caller sees it, with one response or a stream of them."""

    def __init__(self, context: CallContext) -> None:
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
        if context.done() and context.status.result() is CANCELLED:
            raise asyncio.CancelledError
        if response is EOF and (status := context.status.result()).code is not grpc.StatusCode.OK:
            initial = context.initial_metadata.result()
            raise grpc.aio.AioRpcError(status.code, initial, status.trailing_metadata, status.details)
        return response

    def cancel(self) -> bool:
        return self._context.cancel(CANCELLED)

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
