"""The Python client against a real server: behaviour that its own tests, with a scripted server, cannot check."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from conftest import SteppedRunner

from mpt_grpc.errors import OverloadedError
from mpt_grpc_client import (
    AsyncClient,
    Choice,
    Client,
    Constraint,
    FieldViolation,
    FinishReason,
    InvalidRequestError,
    JsonSchema,
    LarkGrammar,
    Message,
    NotFoundError,
    Regex,
    Role,
)
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb


@pytest.fixture
def client(service: Any) -> Iterator[Client]:
    with Client(service.server.target, timeout=60) as client:
        yield client


async def test_large_answers_are_the_same_for_both_clients(service: Any, client: Client) -> None:
    prompt, options = [5] * 300, {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True, "top_logprobs": 20}
    options |= {"return_logprobs": True, "return_prompt_logprobs": True}
    expected = await asyncio.to_thread(client.generate, prompt, **options)
    async with AsyncClient(service.server.target) as async_client:
        whole = await async_client.generate(prompt, **options)
        async with async_client.stream(prompt, **options) as stream:
            streamed = [logprob async for delta in stream.deltas() for logprob in delta.logprobs]
            prompt_logprobs = stream.result.prompt_logprobs
        tokens = await async_client.tokenize("the fox " * 3000)
    assert len(expected.prompt_logprobs) == 299
    assert whole.prompt_logprobs == prompt_logprobs == expected.prompt_logprobs
    assert whole.logprobs == tuple(streamed) == expected.logprobs
    assert tokens == await asyncio.to_thread(client.tokenize, "the fox " * 3000)


async def test_generate_and_stream_return_the_same_in_threads(client: Client) -> None:
    whole = await asyncio.to_thread(
        client.generate, "The fox said", max_new_tokens=30, seed=7, ignore_eos=True, return_token_ids=True
    )
    assert whole.num_tokens == len(whole.token_ids) == whole.usage.num_output_tokens == 30
    assert whole.finish.reason is FinishReason.MAX_NEW_TOKENS
    assert whole.seed == 7
    assert whole.usage.num_prompt_tokens == len(await asyncio.to_thread(client.tokenize, "The fox said"))
    assert whole.timings.queue_time >= 0
    assert whole.timings.time_to_first_token >= whole.timings.prefill_time > 0
    assert whole.timings.decode_time > 0

    def stream() -> tuple[list[str], Any]:
        options: Any = {"max_new_tokens": 30, "seed": 7, "ignore_eos": True, "return_token_ids": True}
        with client.stream("The fox said", **options) as text_stream:
            return list(text_stream), text_stream.result

    chunks, result = await asyncio.to_thread(stream)
    assert "".join(chunks) == result.text == whole.text
    assert result.token_ids == whole.token_ids
    assert all(chunks)


async def test_the_async_client_returns_the_same_text(service: Any, client: Client) -> None:
    expected = await asyncio.to_thread(client.generate, "Once upon a time", max_new_tokens=40, temperature=0)
    async with AsyncClient(service.server.target) as async_client:
        assert (await async_client.generate("Once upon a time", max_new_tokens=40, temperature=0)).text == expected.text
        async with async_client.stream("Once upon a time", max_new_tokens=40, temperature=0) as stream:
            chunks = [chunk async for chunk in stream]
        assert "".join(chunks) == expected.text
        assert stream.usage.num_output_tokens == expected.usage.num_output_tokens
        assert stream.finish == expected.finish


async def test_deltas_of_several_outputs_add_up_to_the_outputs_of_generate(service: Any, client: Client) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 20, "num_sequences": 3, "seed": 7, "return_token_ids": True, "return_logprobs": True,
        "top_logprobs": 2, "return_prompt_logprobs": True, "ignore_eos": True,
    }  # fmt: skip
    whole = await asyncio.to_thread(client.generate, "The fox said", **options)
    assert [output.index for output in whole.outputs] == [0, 1, 2]
    assert len({output.seed for output in whole.outputs}) == 3
    assert whole.usage.num_output_tokens == 60
    assert len(whole.prompt_logprobs) == whole.usage.num_prompt_tokens - 1
    async with AsyncClient(service.server.target, timeout=60) as async_client:
        async with async_client.stream("The fox said", **options) as stream:
            deltas = [delta async for delta in stream.deltas()]
    assert stream.result.outputs == whole.outputs
    # The outputs interleave: the last one starts before the first one ends.
    assert [delta.index for delta in deltas] != sorted(delta.index for delta in deltas)
    last = whole.outputs[2]
    alone = await asyncio.to_thread(
        client.generate, "The fox said", **{**options, "seed": last.seed, "num_sequences": 1}
    )
    assert (alone.text, alone.token_ids) == (last.text, last.token_ids)


async def test_the_chat_template_turns_messages_into_a_prompt(client: Client) -> None:
    messages = [Message(Role.SYSTEM, "A talk."), Message(Role.USER, "Who is there?")]
    result = await asyncio.to_thread(
        client.generate, messages, max_new_tokens=10, temperature=0, return_prompt_token_ids=True
    )
    prompt = await asyncio.to_thread(client.detokenize, result.prompt_token_ids, skip_special_tokens=False)
    assert prompt == "A talk.\n---\nUser: Who is there?\nAssistant:"
    assert (await asyncio.to_thread(client.get_model_info)).chat_template == "base"
    with pytest.raises(InvalidRequestError) as caught:
        await asyncio.to_thread(client.generate, [*messages, Message(Role.ASSISTANT, "I.")])
    assert [violation.field for violation in caught.value.violations] == ["prompt[2].role"]


async def test_the_oldest_turns_are_dropped_only_on_request(client: Client) -> None:
    turn = [Message(Role.USER, "the fox and the moon " * 40), Message(Role.ASSISTANT, "Yes.")]
    messages = [*turn * 100, Message(Role.USER, "So?")]
    context = (await asyncio.to_thread(client.get_model_info)).max_context_tokens
    with pytest.raises(InvalidRequestError, match="have the oldest turns dropped"):
        await asyncio.to_thread(client.generate, messages, max_new_tokens=5)
    result = await asyncio.to_thread(client.generate, messages, max_new_tokens=5, drop_oldest_turns=True)
    assert context // 2 < result.usage.num_prompt_tokens <= context - 5


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Choice("yes", "no"), "yes|no"),
        (Regex("[0-9]{3}-[0-9]{2}"), "[0-9]{3}-[0-9]{2}"),
        (JsonSchema({"enum": [2, 4, 6]}), "2|4|6"),
        (LarkGrammar('start: "a" "b"+ "c"'), "ab+c"),
    ],
)
async def test_an_output_conforms_to_its_constraint(client: Client, constraint: Constraint, pattern: str) -> None:
    result = await asyncio.to_thread(client.generate, "The fox said", constraint=constraint, seed=7, max_new_tokens=400)
    assert re.fullmatch(pattern, result.text)
    assert result.finish.reason is FinishReason.EOS_TOKEN


async def test_an_output_can_be_resumed_from_its_tokens(client: Client) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 30, "seed": 7, "frequency_penalty": 0.5, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    whole = await asyncio.to_thread(client.generate, "The fox said", **options)
    rest = await asyncio.to_thread(client.generate, "The fox said", resume_token_ids=whole.token_ids[:12], **options)
    assert whole.token_ids[:12] + rest.token_ids == whole.token_ids
    assert whole.text.endswith(rest.text)
    assert rest.num_tokens == 18


async def test_a_stop_string_ends_the_text_before_it(client: Client) -> None:
    unstopped = await asyncio.to_thread(client.generate, "Once upon a time", max_new_tokens=40, temperature=0)
    stop = unstopped.text[20:24]
    stopped = await asyncio.to_thread(
        client.generate, "Once upon a time", max_new_tokens=40, temperature=0, stop_strings=stop
    )
    assert stopped.text == unstopped.text[: unstopped.text.index(stop)]
    assert (stopped.finish.reason, stopped.finish.stop_string) == (FinishReason.STOP_STRING, stop)


async def test_tokenize_detokenize_info_and_cancel_work(client: Client) -> None:
    tokens = await asyncio.to_thread(client.tokenize, "Où est la lune?")
    assert b"".join(token.token_bytes for token in tokens).decode() == "Où est la lune?"
    assert await asyncio.to_thread(client.detokenize, [token.token_id for token in tokens]) == "Où est la lune?"
    assert (await asyncio.to_thread(client.get_model_info)).name == "demo"
    assert (await asyncio.to_thread(client.get_server_info)).load.num_blocks == 512
    assert await asyncio.to_thread(client.cancel, "unknown") == ()


async def test_the_engine_state_lists_requests_and_cached_blocks(client: Client) -> None:
    result = await asyncio.to_thread(client.generate, "The fox said", request_id="completed", max_new_tokens=20)
    state = await asyncio.to_thread(client.get_engine_state)
    (request,) = [request for request in state.completed_requests if request.request_id == "completed"]
    assert (request.usage, request.timings) == (result.usage, result.timings)
    assert request.end_time is not None
    assert request.arrival_time < request.end_time <= state.time
    assert request.sequences[0].finish_reason is result.finish.reason
    assert state.cached_blocks
    assert (state.active_requests, state.load.num_running_requests) == ((), 0)


async def test_an_error_lists_all_invalid_options(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await asyncio.to_thread(client.generate, "x", temperature=-1, top_p=0)
    assert caught.value.violations == (
        FieldViolation("temperature", "-1.0 is not in [0, 100]"),
        FieldViolation("top_p", "0.0 is not in (0, 1]; 1 keeps all tokens"),
    )
    with pytest.raises(NotFoundError, match="demo"):
        await asyncio.to_thread(client.generate, "x", model="gpt-7")


async def test_leaving_a_stream_cancels_its_request(make_service: Any, stepped: list[SteppedRunner]) -> None:
    service = await make_service()
    async with AsyncClient(service.server.target) as client:
        stepped[0].run_free()
        async with client.stream("Once upon a time", max_new_tokens=2000, ignore_eos=True) as stream:
            await anext(stream)
        # A drain waits until no call is in progress.
        await service.server.drain()
    assert 0 < stream.num_tokens < 2000
    assert len(stepped[0].plans) < 2000


async def test_a_call_to_a_full_server_is_retried_after_the_requested_time(
    make_service: Any, stepped: list[SteppedRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await make_service(max_running_requests=1, max_waiting_requests=0)
    engine, refused = service.server.engine, asyncio.Event()
    submit = engine.submit

    def submit_and_signal(*arguments: Any, **options: Any) -> Any:
        try:
            return submit(*arguments, **options)
        except OverloadedError:
            refused.set()
            raise

    monkeypatch.setattr(engine, "submit", submit_and_signal)
    with Client(service.server.target, timeout=60) as client:
        first = asyncio.create_task(asyncio.to_thread(client.generate, "first", max_new_tokens=2, ignore_eos=True))
        await asyncio.to_thread(stepped[0].wait_for_step)
        second = asyncio.create_task(asyncio.to_thread(client.generate, "second", max_new_tokens=2, ignore_eos=True))
        await refused.wait()
        stepped[0].run_free()
        assert (await first).num_tokens == (await second).num_tokens == 2


async def test_a_client_may_ping_during_a_long_call(make_service: Any, stepped: list[SteppedRunner]) -> None:
    frequent_pings = [("grpc.keepalive_time_ms", 100), ("grpc.http2.max_pings_without_data", 0)]
    service = await make_service(options=frequent_pings)
    call = service.stub.Generate(pb.GenerateRequest(text="x", stopping=pb.StoppingCriteria(max_new_tokens=1)))
    await asyncio.to_thread(stepped[0].wait_for_step)
    # Pings cannot be counted, so this has to wait: gRPC sends at most one per second, and a server with default
    # settings disconnects at the fourth.
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(call)), 4.5)
    stepped[0].run_free()
    assert (await call).outputs[0].num_tokens == 1


async def test_a_slow_reader_receives_larger_chunks_and_delays_no_other_stream(make_service: Any) -> None:
    # A small HTTP/2 window, which chunks with a long request ID fill quickly.
    service = await make_service(options=[("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0)])
    num_tokens = 300
    request = pb.GenerateRequest(
        text="Once upon a time",
        request_id="slow".ljust(128, "."),
        sampling=pb.SamplingParameters(temperature=0),
        stopping=pb.StoppingCriteria(max_new_tokens=num_tokens, ignore_eos=True),
    )
    slow = aiter(service.stub.StreamGenerate(request))
    first = await anext(slow)

    async with AsyncClient(service.server.target) as other:
        async with other.stream("The fox", max_new_tokens=num_tokens, ignore_eos=True) as quick:
            num_quick_chunks = len([chunk async for chunk in quick])
    assert quick.result.num_tokens == num_tokens
    # The quick request arrived later and has ended, so the engine has finished the slow one too.
    assert service.server.engine.num_in_flight == 0

    chunks = [first, *[chunk async for chunk in slow]]
    assert sum(chunk.output.num_tokens for chunk in chunks) == num_tokens
    assert max(chunk.output.num_tokens for chunk in chunks) > 50
    assert len(chunks) < num_quick_chunks
    whole = await service.stub.Generate(request)
    assert "".join(chunk.output.text for chunk in chunks) == whole.outputs[0].text
    assert await service.all_blocks_free()


async def test_an_async_client_uses_and_closes_the_channel_it_is_given(service: Any) -> None:
    options: Any = {"max_new_tokens": 8, "temperature": 0, "seed": 1, "ignore_eos": True}
    channel = grpc.aio.insecure_channel(service.server.target)
    async with AsyncClient("unix:/nowhere", channel=channel) as client:
        async with client.stream("Once", **options) as stream:
            text = "".join([piece async for piece in stream])
        assert (await client.generate("Once", **options)).text == text
    with pytest.raises(grpc.aio.UsageError):
        channel.unary_unary("/mpt.v1.TextGenerationService/GetServerInfo")(b"")
