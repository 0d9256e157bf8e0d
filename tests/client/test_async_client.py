"""`AsyncClient` is `Client`'s twin: the same surface, the same answers; tasks that are cancelled cancel their calls."""

import asyncio
import inspect

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider

from mpt_grpc_client import (
    AsyncClient,
    AsyncTextStream,
    Client,
    DeadlineExceededError,
    NotFoundError,
    TextStream,
    Token,
)
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

# grpc.aio wants one event loop in a process.
pytestmark = pytest.mark.asyncio(loop_scope="session")


def _surface(kind: type) -> dict[str, object]:
    """The public names of a class with their parameters; what they return differs between the twins by intent."""
    public = inspect.getmembers(kind, lambda member: inspect.isfunction(member) or isinstance(member, property))
    return {
        name: list(inspect.signature(member).parameters.values()) if callable(member) else "property"
        for name, member in public
        if not name.startswith("_") or name == "__init__"
    }


@pytest.mark.parametrize(("sync", "asynchronous"), [(Client, AsyncClient), (TextStream, AsyncTextStream)])
async def test_the_twins_have_the_same_surface(sync, asynchronous):
    surface, twin = _surface(sync), _surface(asynchronous)
    # What a stream is made of is not the caller's.
    if sync is TextStream:
        del surface["__init__"], twin["__init__"]
    assert surface == twin


async def test_the_twins_send_the_same_requests_and_answer_the_same(answer, client, target):
    answer.tokens = pb.TokenizeResponse(tokens=[pb.Token(id=5, bytes=b"a")])
    answer.text = pb.DetokenizeResponse(text="Hello")
    answer.aborted = pb.AbortResponse(request_ids=["b"])
    answer.model = pb.GetModelInfoResponse(name="demo", eos_token_ids=[0])
    answer.server = pb.GetServerInfoResponse(version="1.2.3")
    async with AsyncClient(target, timeout=30) as twin:
        assert await twin.generate("Once", seed=3) == client.generate("Once", seed=3)
        assert await twin.tokenize("a") == client.tokenize("a") == (Token(5, b"a"),)
        assert await twin.detokenize([1], skip_special_tokens=False) == client.detokenize(
            [1], skip_special_tokens=False
        )
        assert await twin.abort("a", "b") == client.cancel("a", "b") == ("b",)
        assert await twin.get_model_info() == client.get_model_info()
        assert await twin.get_server_info() == client.get_server_info()
        assert await twin.get_engine_state() == client.get_engine_state()
    assert answer.requests[::2] == answer.requests[1::2]


@pytest.mark.usefixtures("answer")
async def test_an_async_stream_yields_the_text_and_ends_with_the_unary_result(target):
    async with AsyncClient(target, timeout=30) as client:
        async with client.stream("Once") as stream:
            assert [piece async for piece in stream] == ["Once 🐈", " upon"]
        assert stream.result == await client.generate("Once")
        assert [piece async for piece in stream] == []


@pytest.mark.usefixtures("several")
async def test_async_deltas_are_those_of_the_twin_and_end_with_the_unary_result(client, target):
    async with AsyncClient(target, timeout=30) as twin:
        async with twin.stream("Once", num_sequences=2) as stream:
            with pytest.raises(TypeError, match=r"deltas\(\)"):
                await anext(stream)
            deltas = [delta async for delta in stream.deltas()]
        assert deltas == list(client.stream("Once", num_sequences=2).deltas())
        assert stream.result == await twin.generate("Once", num_sequences=2)
        assert [delta async for delta in stream.deltas()] == []


async def test_async_calls_carry_user_agent_and_trace_context(answer, target):
    async with AsyncClient(target, timeout=30) as client:
        with TracerProvider().get_tracer("test").start_as_current_span("caller") as span:
            await client.generate("Once")
    assert answer.metadata[0]["user-agent"].startswith("mpt-grpc-client/0.")
    assert f"{span.get_span_context().trace_id:032x}" in answer.metadata[0]["traceparent"]


async def test_async_calls_are_retried_by_the_channel(answer, target):
    answer.refuse(grpc.StatusCode.UNAVAILABLE, "not now", "UNAVAILABLE", times=2)
    async with AsyncClient(target, timeout=30) as client:
        assert (await client.generate("Once")).text == "Once 🐈 upon"
    assert len(answer.requests) == 3


async def test_async_errors_are_the_clients_own(answer, target):
    async with AsyncClient(target, timeout=30) as client:
        answer.refuse(grpc.StatusCode.NOT_FOUND, "no such model", "UNKNOWN_MODEL", times=2)
        with pytest.raises(NotFoundError, match="no such model") as caught:
            await client.generate("Once")
        assert caught.value.reason == "UNKNOWN_MODEL"
        assert isinstance(caught.value.__cause__, grpc.aio.AioRpcError)
        with pytest.raises(NotFoundError):
            await anext(client.stream("Once"))


@pytest.mark.usefixtures("endless")
async def test_a_deadline_ends_an_async_stream_which_keeps_its_text(target):
    async with AsyncClient(target, timeout=0.5) as client:
        stream = client.stream("Once")
        with pytest.raises(DeadlineExceededError):
            async for _ in stream:
                pass
    assert stream.text == "Once 🐈"


async def test_leaving_an_async_stream_early_cancels_it(endless, target):
    async with AsyncClient(target, timeout=30) as client:
        async with client.stream("Once") as stream:
            async for _ in stream:
                break
        assert await asyncio.to_thread(endless.left.wait, 10)


async def test_cancel_ends_an_async_iteration_quietly(endless, target):
    async with AsyncClient(target, timeout=30) as client:
        stream = client.stream("Once")
        assert await anext(stream) == "Once 🐈"
        stream.cancel()
        assert [piece async for piece in stream] == []
        assert [delta async for delta in stream.deltas()] == []
        assert await asyncio.to_thread(endless.left.wait, 10)


@pytest.mark.parametrize("unary", [True, False])
async def test_cancelling_a_task_cancels_its_call(endless, target, unary):
    async with AsyncClient(target, timeout=30) as client:

        async def read():
            if unary:
                await client.generate("Once")
            else:
                async for _ in client.stream("Once"):
                    pass

        task = asyncio.create_task(read())
        assert await asyncio.to_thread(endless.reached.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(endless.left.wait, 10)


async def test_a_cancelled_task_is_not_mistaken_for_a_cancelled_stream(endless, target):
    async with AsyncClient(target, timeout=30) as client:
        stream = client.stream("Once")

        async def read():
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        assert await asyncio.to_thread(endless.reached.wait, 10)
        stream.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_an_async_client_is_refused_outside_of_a_running_loop():
    with pytest.raises(RuntimeError, match="no running event loop"):
        await asyncio.to_thread(AsyncClient)
