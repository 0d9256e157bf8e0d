"""The local channel has the contract of a grpc.aio channel over a connection: each test runs with both."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest

from mpt_grpc.server.local_channel import LocalChannel

DEADLINE_S = 0.2
GUARD_S = 30
_caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="")


class Unchanged(grpc.aio.ServerInterceptor):
    """Sees the method and the metadata of each call and changes nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        self.seen.append((handler_call_details.method, dict(handler_call_details.invocation_metadata)))
        return await continuation(handler_call_details)


class Service:
    """Both kinds of methods, which run `script`, on a server with an interceptor."""

    def __init__(self, channel: grpc.aio.Channel, interceptor: Unchanged) -> None:
        self.channel, self.interceptor = channel, interceptor
        self.script: Callable[[bytes, Any], AsyncIterator[bytes]] = count
        self.num_sent = 0
        self.started, self.ended = asyncio.Event(), asyncio.Event()

    def call(self, method: str, request: bytes = b"", **options: Any) -> Any:
        kind = self.channel.unary_unary if method == "Unary" else self.channel.unary_stream
        return kind(f"/test.Test/{method}")(request, **options)

    async def stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            async for response in self.script(request, context):
                self.num_sent += 1
                self.started.set()
                yield response
        finally:
            self.ended.set()

    async def unary(self, request: bytes, context: Any) -> bytes:
        return b",".join([response async for response in self.stream(request, context)])


async def count(request: bytes, _: Any) -> AsyncIterator[bytes]:
    for number in range(int(request or b"0")):
        yield str(number).encode()


async def hang(*_: Any) -> AsyncIterator[bytes]:
    yield b"first"
    await asyncio.Event().wait()


@asynccontextmanager
async def serving(is_local: bool) -> AsyncIterator[Service]:
    interceptor = Unchanged()
    server: Any = LocalChannel(interceptor) if is_local else grpc.aio.server(interceptors=[interceptor])
    port = 0 if is_local else server.add_insecure_port("127.0.0.1:0")
    channel = server if is_local else grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    service = Service(channel, interceptor)
    methods: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(service.unary),  # type: ignore[arg-type]
        "Stream": grpc.unary_stream_rpc_method_handler(service.stream),  # type: ignore[arg-type]
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Test", methods)])
    async with asyncio.timeout(GUARD_S):
        if is_local:
            async with channel:
                yield service
            return
        await server.start()
        try:
            async with channel:
                yield service
        finally:
            await server.stop(0)


@pytest.fixture(params=["connection", "local"])
async def service(request: pytest.FixtureRequest) -> AsyncIterator[Service]:
    async with serving(request.param == "local") as service:
        yield service


async def outcome(call: Any) -> tuple[list[bytes], grpc.StatusCode]:
    """Returns the responses of a call to its end, and its status."""
    responses = []
    with suppress(grpc.aio.AioRpcError):
        if isinstance(call, grpc.aio.UnaryStreamCall):
            responses = [response async for response in call]
    return responses, await call.code()


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read() if isinstance(call, grpc.aio.UnaryStreamCall) else await call
    return caught.value


async def test_responses_arrive_in_order_and_then_the_end(service: Service) -> None:
    numbers = [str(number).encode() for number in range(100)]
    assert await service.call("Unary", b"100") == b",".join(numbers)
    call = service.call("Stream", b"100")
    assert await outcome(call) == (numbers, grpc.StatusCode.OK)
    assert call.done()
    assert not call.cancelled()
    assert not call.cancel()
    assert await outcome(service.call("Stream", b"0")) == ([], grpc.StatusCode.OK)


@pytest.mark.parametrize("method", ["Unary", "Stream"])
async def test_metadata_arrives_both_ways(service: Service, method: str) -> None:
    async def script(_: bytes, context: Any) -> AsyncIterator[bytes]:
        received = dict(context.invocation_metadata())
        await context.send_initial_metadata([("initial", received["name"])])
        context.set_trailing_metadata([("trailing-bin", received["name-bin"])])
        yield b""

    service.script = script
    metadata = (("name", "value"), ("name-bin", b"\x00\xff"))
    call = service.call(method, metadata=metadata)
    assert dict(await call.initial_metadata())["initial"] == "value"
    await (call if method == "Unary" else outcome(call))
    assert dict(await call.trailing_metadata())["trailing-bin"] == b"\x00\xff"
    path, seen = service.interceptor.seen[-1]
    assert path == f"/test.Test/{method}"
    assert seen.items() >= dict(metadata).items()


@pytest.mark.parametrize("method", ["Unary", "Stream"])
async def test_an_abort_arrives_with_its_status_and_metadata_after_earlier_responses(
    service: Service, method: str
) -> None:
    async def script(_: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing", (("details-bin", b"\x01"),))

    service.script = script
    call = service.call(method)
    if method == "Stream":
        assert await call.read() == b"first"
    error = await failure(call)
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no such thing")
    assert dict(error.trailing_metadata() or ())["details-bin"] == b"\x01"
    assert (await call.code(), await call.details()) == (error.code(), error.details())


@pytest.mark.parametrize("method", ["Unary", "Stream"])
async def test_an_exception_of_the_handler_is_unknown(service: Service, method: str) -> None:
    async def script(*_: Any) -> AsyncIterator[bytes]:
        raise ValueError("a bug")
        yield b""

    service.script = script
    error = await failure(service.call(method))
    assert error.code() is grpc.StatusCode.UNKNOWN
    assert "a bug" in (error.details() or "")


async def test_an_unknown_method_is_unimplemented(service: Service) -> None:
    error = await failure(service.channel.unary_unary("/test.Test/Unknown")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("method", ["Unary", "Stream"])
async def test_a_deadline_ends_the_call_and_its_handler(service: Service, method: str) -> None:
    remaining = []

    async def script(request: bytes, context: Any) -> AsyncIterator[bytes]:
        remaining.append(context.time_remaining())
        async for response in hang(request, context):
            yield response

    service.script = script
    call = service.call(method, timeout=DEADLINE_S)
    if method == "Stream":
        assert await call.read() == b"first"
    assert (await failure(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await service.ended.wait()
    assert 0 < remaining[0] <= DEADLINE_S * 1.01  # gRPC rounds the time that it sends up by up to a hundredth


@pytest.mark.parametrize("way", ["cancel", "task", "close"])
@pytest.mark.parametrize("method", ["Unary", "Stream"])
async def test_a_caller_who_leaves_ends_the_handler(service: Service, method: str, way: str) -> None:
    service.script = hang
    call = service.call(method)

    async def read() -> Any:
        return await call if method == "Unary" else [response async for response in call]

    reading = asyncio.ensure_future(read())
    await service.started.wait()
    if way == "cancel":
        assert call.cancel()
    elif way == "task":
        reading.cancel()
    else:
        await service.channel.close()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await service.ended.wait()
    assert call.cancelled()
    assert await call.code() is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("method", ["Unary", "Stream"])
async def test_a_call_cancelled_at_once_ends_without_an_answer(service: Service, method: str) -> None:
    call = service.call(method, b"1")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await (call if method == "Unary" else call.read())
    assert await service.call("Unary", b"1") == b"0"


async def test_the_handler_waits_for_its_reader(service: Service) -> None:
    size, num_messages = 1 << 20, 64

    async def script(*_: Any) -> AsyncIterator[bytes]:
        for _ in range(num_messages):
            yield b"x" * size

    service.script = script
    stream = aiter(service.call("Stream"))
    await anext(stream)
    # The calls that follow are served while the stream is not read.
    for _ in range(100):
        service.script = count
        await service.call("Unary", b"0")
    assert service.num_sent < num_messages / 2
    assert len([response async for response in stream]) == num_messages - 1


async def test_nothing_of_the_callers_context_reaches_the_handler(service: Service) -> None:
    async def script(*_: Any) -> AsyncIterator[bytes]:
        yield _caller.get().encode()
        _caller.set("handler")

    service.script = script
    _caller.set("caller")
    assert await service.call("Unary") == b""
    assert _caller.get() == "caller"


async def test_calls_may_finish_within_the_grace_period_of_a_close(service: Service) -> None:
    reading = asyncio.ensure_future(outcome(service.call("Stream", b"3")))
    await service.started.wait()
    await service.channel.close(GUARD_S)
    assert await reading == ([b"0", b"1", b"2"], grpc.StatusCode.OK)


async def test_a_closed_channel_refuses_calls(service: Service) -> None:
    await service.channel.close()
    with pytest.raises(grpc.aio.UsageError):
        await service.call("Unary", b"1")
