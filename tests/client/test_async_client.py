"""`AsyncClient` has the same interface and results as `Client`; cancelling a task cancels its call."""

import asyncio
import inspect
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.sdk.trace import TracerProvider

from mpt_grpc_client import (
    AsyncClient,
    AsyncTextStream,
    Client,
    DeadlineExceededError,
    MptGrpcError,
    NotFoundError,
    PreparedPrompt,
    TextStream,
    Token,
)
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb


def _interface(kind: type) -> dict[str, object]:
    """Returns the public names of a class with their parameters; types of results and channels differ."""
    public = inspect.getmembers(kind, lambda member: inspect.isfunction(member) or isinstance(member, property))
    return {
        name: str(inspect.signature(member)).rpartition(" ->")[0].replace("grpc.aio.", "grpc.")
        if callable(member)
        else "property"
        for name, member in public
        if not name.startswith("_") or name == "__init__"
    }


@pytest.mark.parametrize(("sync", "asynchronous"), [(Client, AsyncClient), (TextStream, AsyncTextStream)])
async def test_both_clients_have_the_same_interface(sync, asynchronous):
    interface, other = _interface(sync), _interface(asynchronous)
    # Callers do not construct streams.
    if sync is TextStream:
        del interface["__init__"], other["__init__"]
    assert interface == other


async def test_a_prepared_prompt_is_sent_like_its_prompt_and_options(scripted, client, target, other_target):
    scripted.chunks = [
        pb.StreamGenerateResponse(output=pb.Output(text="a", finish=pb.Finish(reason=1)), summary=pb.Summary())
    ]
    prepared = PreparedPrompt("Once", seed=3, max_new_tokens=4)
    with Client([target, other_target]) as balanced:  # which adds to what it sends
        balanced.generate(prepared)
        list(balanced.stream(prepared))
    scripted.requests.clear()
    client.generate("Once", seed=3, max_new_tokens=4)
    client.generate(prepared, timeout=30)
    list(client.stream(prepared))
    async with AsyncClient(target, timeout=30) as other:
        await other.generate(prepared)
        _ = [text async for text in other.stream(prepared)]
        with pytest.raises(TypeError, match="seed: a PreparedPrompt has its options already"):
            await other.generate(prepared, seed=4)
    assert scripted.requests == [scripted.requests[0]] * 5


def test_a_prepared_prompt_is_not_prepared_again():
    with pytest.raises(TypeError, match="must be a string, token IDs or messages, not PreparedPrompt"):
        PreparedPrompt(PreparedPrompt("Once"), max_new_tokens=4)


async def test_both_clients_send_the_same_requests_and_return_the_same(scripted, client, target):
    scripted.tokens = pb.TokenizeResponse(tokens=[pb.Token(token_id=5, token_bytes=b"a")])
    scripted.text = pb.DetokenizeResponse(text="Hello")
    scripted.cancelled = pb.CancelResponse(request_ids=["b"])
    scripted.model = pb.GetModelInfoResponse(name="demo", eos_token_ids=[0])
    scripted.server = pb.GetServerInfoResponse(version="1.2.3")
    async with AsyncClient(target, timeout=30) as other:
        assert await other.generate("Once", seed=3) == client.generate("Once", seed=3)
        assert await other.tokenize("a") == client.tokenize("a") == (Token(5, b"a"),)
        assert await other.detokenize([1], skip_special_tokens=False) == client.detokenize(
            [1], skip_special_tokens=False
        )
        assert await other.cancel("a", "b") == client.cancel("a", "b") == ("b",)
        assert await other.get_model_info() == client.get_model_info()
        assert await other.get_server_info() == client.get_server_info()
        assert await other.get_engine_state() == client.get_engine_state()
    assert scripted.requests[::2] == scripted.requests[1::2]


@pytest.mark.usefixtures("scripted")
async def test_an_async_stream_yields_the_text_and_ends_with_the_unary_result(target):
    async with AsyncClient(target, timeout=30) as client:
        async with client.stream("Once") as stream:
            assert [chunk async for chunk in stream] == ["Once 🐈", " upon"]
        assert stream.result == await client.generate("Once")
        assert [chunk async for chunk in stream] == []


@pytest.mark.usefixtures("two_outputs")
async def test_async_deltas_equal_the_synchronous_ones_and_end_with_the_unary_result(client, target):
    async with AsyncClient(target, timeout=30) as other:
        async with other.stream("Once", num_sequences=2) as stream:
            with pytest.raises(TypeError, match=r"deltas\(\)"):
                await anext(stream)
            deltas = [delta async for delta in stream.deltas()]
        assert deltas == list(client.stream("Once", num_sequences=2).deltas())
        assert stream.result == await other.generate("Once", num_sequences=2)
        assert [delta async for delta in stream.deltas()] == []


async def test_async_calls_carry_user_agent_and_trace_context(scripted, target):
    async with AsyncClient(target, timeout=30) as client:
        with TracerProvider().get_tracer("test").start_as_current_span("caller") as span:
            await client.generate("Once")
    assert scripted.metadata[0]["user-agent"].startswith("mpt-grpc-client/0.")
    assert f"{span.get_span_context().trace_id:032x}" in scripted.metadata[0]["traceparent"]


async def test_async_calls_are_retried_by_the_channel(scripted, target):
    scripted.refuse(grpc.StatusCode.UNAVAILABLE, "not now", "DRAINING", times=2)
    async with AsyncClient(target, timeout=30) as client:
        assert (await client.generate("Once")).text == "Once 🐈 upon"
    assert len(scripted.requests) == 3


async def test_async_calls_raise_the_clients_errors(scripted, target):
    async with AsyncClient(target, timeout=30) as client:
        scripted.refuse(grpc.StatusCode.NOT_FOUND, "no such model", "UNKNOWN_MODEL", times=2)
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
        assert [chunk async for chunk in stream] == []
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


def test_an_async_client_may_be_created_outside_of_an_event_loop(scripted, target):
    client = AsyncClient(target)

    async def generate() -> str:
        async with client:
            return (await client.generate("Once")).text

    assert asyncio.run(generate()) == scripted.response.outputs[0].text


async def test_an_async_client_is_refused_in_a_second_event_loop(scripted, target):
    async with AsyncClient(target) as client:
        await client.generate("Once")
        with pytest.raises(RuntimeError, match="in use by another event loop"):
            await asyncio.to_thread(asyncio.run, client.generate("Once"))
    assert len(scripted.requests) == 1


async def test_calls_of_a_closed_async_client_fail_with_an_error_of_the_client(target):
    client = AsyncClient(target)
    await client.close()
    with pytest.raises(MptGrpcError, match="the client is closed"):
        await client.generate("Once")
    with pytest.raises(MptGrpcError, match="the client is closed"):
        client.stream("Once")


async def test_a_stream_that_failed_and_was_cancelled_ends_in_both_clients(service, target):
    # The second response follows the failure on the connection.
    service.refuse(grpc.StatusCode.NOT_FOUND, "no such model", "UNKNOWN_MODEL")
    with Client(target) as client:
        stream = client.stream("Once")
        while not service.requests:
            pass
        client.get_model_info()
        stream.cancel()
        assert list(stream) == []
    service.requests.clear()
    service.refuse(grpc.StatusCode.NOT_FOUND, "no such model", "UNKNOWN_MODEL")
    async with AsyncClient(target) as client:
        stream = client.stream("Once")
        while not service.requests:  # noqa: ASYNC110  (the service runs in threads)
            await asyncio.sleep(0)
        await client.get_model_info()
        stream.cancel()
        assert [chunk async for chunk in stream] == []


def test_cancelling_a_task_that_converts_a_chunk_cancels_its_call(endless, scripted, target):
    """grpc.aio does not notice it, since the task does not wait for grpc.aio."""
    scripted.chunks[0].output.MergeFrom(pb.Output(token_ids=[5] * 2000, num_tokens=2000))  # converted in a thread

    class FullPool(ThreadPoolExecutor):
        def submit(self, *_arguments, **_options):
            self.submitted.set()
            return Future()

    async def read() -> None:
        pool = FullPool()
        pool.submitted = asyncio.Event()
        asyncio.get_running_loop().set_default_executor(pool)
        async with AsyncClient(target, timeout=30) as client:
            stream = client.stream("Once")
            task = asyncio.create_task(anext(stream))
            await pool.submitted.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not endless.left.is_set():  # noqa: ASYNC110  (the service runs in threads)
                await asyncio.sleep(0)

    asyncio.run(read())
