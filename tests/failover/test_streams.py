"""A generation whose connection breaks, or whose server ends, goes on with another server: the same to the last bit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from conftest import demo_settings
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_status.rpc_status import from_call

from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import Settings
from mpt_grpc_client import (
    AsyncClient,
    AsyncTextStream,
    Client,
    DeadlineExceededError,
    FinishReason,
    Generation,
    JsonSchema,
    Message,
    Regex,
    RepetitionGuard,
    Role,
    Tool,
    UnavailableError,
)
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub
from tools.relay import Relay, relaying

PROMPT = "Once upon a time there was a fox"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 8, "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FRACTIONS = (0.6, 0.5, 0.7, 0.4, 0.8)
"""After how much of a response the connection breaks: at the first of these at which there are tokens to resume."""
BYTES = tuple(range(130, 250))
"""Tokens of single bytes, most of which are parts of characters."""
LOGPROBS = {"return_logprobs": True, "top_logprobs": 3, "return_prompt_logprobs": True, "return_prompt_token_ids": True}
CASES: dict[str, dict[str, Any]] = {
    "sampling and penalties": {
        "temperature": 0.9, "top_k": 200, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95, "repetition_penalty": 1.3,
        "frequency_penalty": 0.4, "presence_penalty": 0.3, "logit_bias": {50: 5.0, 60: -100.0}, **LOGPROBS,
    },
    "log probabilities of the prompt": {"temperature": 0, "return_prompt_logprobs": True, "top_logprobs": 2},
    "incomplete characters": {"allowed_token_ids": BYTES, "return_token_ids": True},
    "held stop strings": {"stop_strings": [" the fox and", "\n\n\n"], "include_stop_string": True},
    "a stop string that is found": {"stop_strings": ["a"], "min_new_tokens": 18},
    "stop tokens": {"stop_token_ids": list(range(64)), "min_new_tokens": 16, "ignore_eos": False},
    "a repetition": {"temperature": 0, "repetition_guard": RepetitionGuard(12, 2), "allowed_token_ids": [50, 60]},
    "a schema": {"constraint": JsonSchema(PERSON), "ignore_eos": None},
    "a regular expression": {"constraint": Regex("[a-z]{20,30} [0-9]{8}"), "ignore_eos": None},
    "special tokens in large chunks": {"skip_special_tokens": False, "logit_bias": {0: 8.0}, "chunk_tokens": 5},
    "several outputs": {"num_sequences": 4, "ignore_eos": False, "logit_bias": {0: 3.0}, **LOGPROBS},
    "several outputs with a schema": {"num_sequences": 2, "constraint": JsonSchema(PERSON), "ignore_eos": None},
    "several outputs without the cache": {"num_sequences": 2, "cache_bypass": True, "stop_strings": ["zebra"]},
    "calls of tools": {
        "prompt": [Message(Role.USER, "Who is there?")], "tools": [Tool("tell", "", PERSON)], "tool_choice": "required",
        "request_id": "calls", "num_sequences": 2, "max_new_tokens": 90, "ignore_eos": None,
    },
    "a resumed output": {
        "resume_token_ids": [50, 60, 70], "return_token_ids": True, "request_id": "mine", "cache_salt": "tenant",
    },
}  # fmt: skip


def options_of(case: str) -> dict[str, Any]:
    """Returns the options of a case. The seed is the client's own unless it is given."""
    return {"max_new_tokens": 28, "ignore_eos": True, "seed": 11, **CASES[case]}


def essence(generation: Generation) -> Generation:
    """Returns what must be the same in two generations: all but IDs, times and what the cache had."""
    usage = replace(generation.usage, num_cached_tokens=0, num_preemptions=0)
    return replace(generation, request_id="", usage=usage, timings=None, resumptions=(), trace_id="")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
async def servers() -> AsyncIterator[tuple[RunningServer, RunningServer]]:
    async with running_server(demo_settings()) as one, running_server(demo_settings()) as other:
        yield one, other


@pytest.fixture
async def relay(servers: tuple[RunningServer, RunningServer]) -> AsyncIterator[Relay]:
    """A relay to the first server."""
    async with relaying(servers[0].target) as relay:
        yield relay


async def stream_all(targets: list[str], options: dict[str, Any], *, is_async: bool, **client: Any) -> Generation:
    """Returns the result of a stream, which must be what its deltas add up to."""
    prompt = options.get("prompt", PROMPT)
    options = {name: value for name, value in options.items() if name != "prompt"}
    if is_async:
        async with AsyncClient(targets, timeout=60, **client) as async_client:
            async with async_client.stream(prompt, **options) as async_stream:
                deltas = [delta async for delta in async_stream.deltas()]
        result = async_stream.result
    else:

        def read() -> tuple[list[Any], Generation]:
            with Client(targets, timeout=60, **client) as sync_client:
                with sync_client.stream(prompt, **options) as stream:
                    return list(stream.deltas()), stream.result

        deltas, result = await asyncio.to_thread(read)
    for output in result.outputs:
        own = [delta for delta in deltas if delta.index == output.index]
        assert "".join(delta.text for delta in own) == output.text
        assert [delta.finish for delta in own if delta.finish] == [output.finish]
        if not options.get("return_token_ids"):
            assert not any(delta.token_ids for delta in own)
    return result


async def disturbed(
    relay: Relay, other: RunningServer, options: dict[str, Any], *, is_async: bool = True, **client: Any
) -> tuple[Generation, Generation]:
    """Returns a generation as it is without a fault, and as it is if its connection breaks in mid-stream."""
    targets = [relay.target, other.target]
    before = relay.num_bytes
    whole = await stream_all(targets, options, is_async=is_async, **client)
    num_bytes = relay.num_bytes - before
    assert whole.resumptions == ()
    for fraction in FRACTIONS:
        relay.cut_after = relay.num_bytes + int(fraction * num_bytes)
        broken = await stream_all(targets, options, is_async=is_async, **client)
        if broken.resumptions:
            break
        # The connection broke before the first token. That is no resumption, but must not be noticed either.
        assert essence(broken) == essence(whole)
    return whole, broken


async def cut_short(relay: Relay, stream: AsyncTextStream, *others: Relay) -> Generation:
    """Reads a stream whose server, and others, are cut off when a few tokens have arrived."""
    async for _ in stream.deltas():
        if stream.num_tokens > 5 and not relay.is_cut:
            for one in (relay, *others):
                one.cut()
    return stream.result


@pytest.mark.parametrize(("case", "is_async"), [(case, index % 3 > 0) for index, case in enumerate(CASES)])
async def test_a_broken_stream_goes_on_as_if_nothing_had_happened(
    servers: tuple[RunningServer, RunningServer], relay: Relay, case: str, is_async: bool
) -> None:
    whole, broken = await disturbed(relay, servers[1], options_of(case), is_async=is_async)
    (resumption,) = broken.resumptions
    assert (resumption.target, resumption.is_exact) == (servers[1].target, True)
    assert 0 < resumption.num_tokens <= broken.usage.num_output_tokens
    assert essence(broken) == essence(whole)


@pytest.mark.parametrize("is_async", [True, False], ids=["asyncio", "threads"])
async def test_generate_survives_a_server_too(
    servers: tuple[RunningServer, RunningServer], relay: Relay, is_async: bool
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "ignore_eos": True, "seed": 5, "return_logprobs": True}

    async def generate(*targets: str) -> Generation:
        if is_async:
            async with AsyncClient(targets, timeout=60) as async_client:
                return await async_client.generate(PROMPT, **options)
        with Client(targets, timeout=60) as client:
            return await asyncio.to_thread(client.generate, PROMPT, **options)

    whole = await generate(servers[1].target)
    before = relay.num_bytes
    assert essence(await generate(relay.target, servers[1].target)) == essence(whole)
    relay.cut_after = relay.num_bytes + (relay.num_bytes - before) * 2 // 3
    broken = await generate(relay.target, servers[1].target)
    assert len(broken.resumptions) == 1
    assert essence(broken) == essence(whole)


async def test_a_seed_that_the_caller_does_not_set_is_kept(
    servers: tuple[RunningServer, RunningServer], relay: Relay
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 100, "ignore_eos": True}
    async with AsyncClient([relay.target, servers[1].target], timeout=60) as client:
        broken = await cut_short(relay, client.stream(PROMPT, **options))
        assert len(broken.resumptions) == 1
        assert essence(broken) == essence(await client.generate(PROMPT, **options, seed=broken.seed))


async def test_a_guard_sees_the_text_before_the_resumption(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        words = tmp_path / "words.txt"
        words.write_text("/fox[^~]*fox/\n", encoding="utf-8")
        guarded = replace(demo_settings(), guards=(f"words={words}",))
        one, other = [await stack.enter_async_context(running_server(guarded)) for _ in range(2)]
        relay = await stack.enter_async_context(relaying(one.target))
        options = {"seed": 3, "max_new_tokens": 36, "ignore_eos": True, "return_token_ids": True}
        whole, broken = await disturbed(relay, other, {**options, "prompt": "Said the"})
    assert len(broken.resumptions) == 1
    assert essence(broken) == essence(whole)


async def test_a_conversation_goes_on_with_the_stop_strings_of_its_template(
    servers: tuple[RunningServer, RunningServer], relay: Relay
) -> None:
    messages = [Message(Role.SYSTEM, "Be kind."), Message(Role.USER, "Tell me about the fox.")]
    options = {"prompt": messages, "seed": 3, "max_new_tokens": 36, "ignore_eos": True}
    whole, broken = await disturbed(relay, servers[1], options)
    assert len(broken.resumptions) == 1
    assert essence(broken) == essence(whole)


async def test_the_time_limit_counts_from_the_beginning(
    servers: tuple[RunningServer, RunningServer], relay: Relay
) -> None:
    start_s = time.monotonic()
    async with AsyncClient([relay.target, servers[1].target], timeout=60) as client:
        stream = client.stream(PROMPT, max_new_tokens=2000, ignore_eos=True, chunk_tokens=8, time_limit=1)
        await anext(stream)
        await asyncio.sleep(0.5)
        result = await cut_short(relay, stream)
    assert result.finish.reason is FinishReason.TIME_LIMIT
    assert len(result.resumptions) == 1
    assert time.monotonic() - start_s < 1.5  # if it began anew


async def test_the_timeout_covers_all_servers(servers: tuple[RunningServer, RunningServer], relay: Relay) -> None:
    start_s = time.monotonic()
    async with AsyncClient([relay.target, servers[1].target], timeout=1) as client:
        stream = client.stream(PROMPT, max_new_tokens=2000, ignore_eos=True, chunk_tokens=8)
        await anext(stream)
        await asyncio.sleep(0.5)
        with pytest.raises(DeadlineExceededError, match=r"the client's timeout of 1 s has passed after \d+ tokens"):
            await cut_short(relay, stream)
    assert len(stream.resumptions) == 1
    assert time.monotonic() - start_s < 1.5


async def test_a_server_that_might_generate_other_tokens_continues_only_on_request(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    changed = demo_settings()
    changed = replace(changed, model=replace(changed.model, dtype="bfloat16", max_context_tokens=1024))
    options: dict[str, Any] = {"max_new_tokens": 100, "ignore_eos": True, "seed": 5}
    async with running_server(changed) as different:
        async with relaying(servers[0].target) as relay, AsyncClient([relay.target, different.target]) as client:
            with pytest.raises(UnavailableError) as caught:
                await cut_short(relay, client.stream(PROMPT, **options))
        differs = "this server differs from the one that began the output in defaults, precision"
        assert f"{different.target}: {differs}" in str(caught.value)
        assert f"{relay.target}: no server responds" in str(caught.value)

        async with relaying(servers[0].target) as relay:
            targets = [relay.target, different.target]
            async with AsyncClient(targets, timeout=60, resume_inexact=True) as client:
                result = await cut_short(relay, client.stream(PROMPT, **options))
        assert [resumption.is_exact for resumption in result.resumptions] == [False]
        assert result.num_tokens == 100


async def test_without_another_server_the_error_says_how_each_failed(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    async with relaying(servers[0].target) as one, relaying(servers[1].target) as other:
        async with AsyncClient([one.target, other.target], timeout=60) as client:
            stream = client.stream(PROMPT, max_new_tokens=500, ignore_eos=True)
            with pytest.raises(UnavailableError) as caught:
                await cut_short(one, stream, other)
    assert all(f"{relay.target}: no server responds" in str(caught.value) for relay in (one, other))
    assert stream.text


async def test_calls_are_spread_and_a_dead_server_is_not_tried_again_and_again(
    servers: tuple[RunningServer, RunningServer], relay: Relay
) -> None:
    async with AsyncClient([relay.target, servers[1].target], timeout=60) as client:
        passed_relay = set()
        for _ in range(4):
            before = relay.num_bytes
            await client.get_server_info()
            passed_relay.add(relay.num_bytes > before)
        assert passed_relay == {True, False}
        assert await client.cancel("unknown") == ()
        relay.cut()
        for _ in range(20):
            assert (await client.get_model_info()).name == "demo"
        assert await client.cancel("unknown") == ()
    assert relay.num_connections <= 4


async def test_the_turns_of_a_conversation_go_to_the_server_that_has_its_beginning(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    messages = [Message(Role.SYSTEM, "You keep a lighthouse. " * 25), Message(Role.USER, "Who are you?")]
    num_prompt_tokens = 0
    async with AsyncClient([server.target for server in servers], timeout=60) as client:
        for _ in range(4):
            result = await client.generate(messages, max_new_tokens=8, ignore_eos=True)
            assert result.usage.num_cached_tokens > num_prompt_tokens - 16  # a block
            num_prompt_tokens = result.usage.num_prompt_tokens
            messages += [Message(Role.ASSISTANT, result.text), Message(Role.USER, "And then?")]


async def test_a_name_stands_for_all_its_addresses(servers: tuple[RunningServer, RunningServer]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 100, "ignore_eos": True, "seed": 5}
    async with relaying(servers[0].target) as one, relaying(servers[1].target, "::1", one.port) as other:
        async with AsyncClient(f"dns:///localhost:{one.port}", timeout=60) as client:
            whole = await client.generate(PROMPT, **options)
            before = {relay: relay.num_bytes for relay in (one, other)}
            stream = client.stream(PROMPT, **options)
            for _ in range(10):
                await anext(stream)
            # The other one may have forwarded a ping or the health of its server.
            serving = max(before, key=lambda relay: relay.num_bytes - before[relay])
            result = await cut_short(serving, stream)
    assert len(result.resumptions) == 1
    assert essence(result) == essence(whole)


@pytest.mark.parametrize("is_async", [True, False], ids=["asyncio", "threads"])
async def test_cancel_reaches_every_address_of_a_name(tmp_path: Path, is_async: bool) -> None:
    authority = Authority.new()
    tls = authority.write_server(tmp_path)  # whose certificate has the name, and not the second address
    options: dict[str, Any] = {"max_new_tokens": 2000, "ignore_eos": True}
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(running_server(server_settings(tls=tls))) for _ in range(2)]
        relay = await stack.enter_async_context(relaying(one.target.removeprefix("grpcs://")))
        await stack.enter_async_context(relaying(other.target.removeprefix("grpcs://"), "::1", relay.port))
        connection: Any = {"timeout": 60, "root_certificates": authority.pem}
        client = await stack.enter_async_context(AsyncClient(f"dns:///localhost:{relay.port}", **connection))
        streams: dict[str, AsyncTextStream] = {}
        while not (one.engine.num_in_flight and other.engine.num_in_flight):
            request_id = f"r{len(streams)}"
            streams[request_id] = client.stream(PROMPT, request_id=request_id, **options)
            await anext(streams[request_id])
        if is_async:
            cancelled = await client.cancel(*streams)
        else:
            with Client(f"dns:///localhost:{relay.port}", **connection) as sync_client:
                cancelled = await asyncio.to_thread(sync_client.cancel, *streams)
        assert sorted(cancelled) == sorted(streams)
        for stream in streams.values():
            async for _ in stream:
                pass
            assert stream.finish is not None
            assert stream.finish.reason is FinishReason.CANCELLED


async def test_cancel_reaches_a_server_that_drains(servers: tuple[RunningServer, RunningServer]) -> None:
    async with running_server(server_settings(grace_s=60)) as draining:
        async with AsyncClient([draining.target, servers[0].target], timeout=60) as client:
            stream = client.stream(PROMPT, request_id="r", max_new_tokens=2000, ignore_eos=True)
            await anext(stream)
            drain = asyncio.create_task(draining.drain())
            while await is_serving(draining.target):
                pass
            assert await client.cancel("r") == ("r",)
            async for _ in stream:
                pass
            await drain
    assert stream.resumptions == ()


async def is_serving(target: str) -> bool:
    async with grpc.aio.insecure_channel(target) as channel:
        stub: Any = HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest())
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def test_a_request_that_breaks_every_server_is_tried_on_three_of_them(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    async with AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(relaying(servers[0].target)) for _ in range(5)]
        by_target = {relay.target: relay for relay in relays}
        client = await stack.enter_async_context(AsyncClient(list(by_target), timeout=60))
        stream = client.stream(PROMPT, max_new_tokens=500, ignore_eos=True)

        async def cut_each() -> None:
            async for _ in stream.deltas():
                target = stream.resumptions[-1].target if stream.resumptions else relays[0].target
                by_target[target].cut()

        with pytest.raises(UnavailableError, match="given up because servers broke 3 times while they ran this call"):
            await cut_each()
        assert sum(relay.is_cut for relay in relays) == 3
    assert len(stream.resumptions) == 2


def server_settings(**changes: Any) -> Settings:
    settings = demo_settings()
    return replace(settings, server=replace(settings.server, **changes))


async def test_old_connections_are_replaced_and_their_streams_continue() -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_server(server_settings(max_connection_age_s=0.1)))
        relay = await stack.enter_async_context(relaying(server.target))
        client = await stack.enter_async_context(AsyncClient(relay.target, timeout=60))
        stream = client.stream(PROMPT, max_new_tokens=600, ignore_eos=True)
        await anext(stream)
        while relay.num_connections < 3:
            await client.get_model_info()
        assert server.engine.num_in_flight == 1
        async for _ in stream:
            pass
    assert (stream.num_tokens, stream.resumptions) == (600, ())


async def test_a_drained_server_hands_its_streams_over(servers: tuple[RunningServer, RunningServer]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 100, "ignore_eos": True, "seed": 5}
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncClient(servers[1].target))
        whole = await client.generate(PROMPT, **options)
        draining = AsyncExitStack()
        one = await draining.enter_async_context(running_server(server_settings(grace_s=0)))
        both = await stack.enter_async_context(AsyncClient([one.target, servers[1].target], timeout=60))
        stream = both.stream(PROMPT, **options)
        await anext(stream)
        await one.drain()
        await draining.aclose()
        async for _ in stream:
            pass
    assert len(stream.resumptions) == 1
    assert essence(stream.result) == essence(whole)


async def test_the_error_of_a_drained_server_says_how_to_continue_elsewhere(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    """A client in any language needs the stubs only, even if it did not ask for token IDs."""
    num_sequences = 2
    request = pb.GenerateRequest(
        text=PROMPT,
        sampling=pb.SamplingParameters(num_sequences=num_sequences),
        stopping=pb.StoppingCriteria(max_new_tokens=80, ignore_eos=True),
    )
    texts = dict.fromkeys(range(num_sequences), "")
    async with running_server(server_settings(grace_s=0)) as one:
        channel = grpc.aio.insecure_channel(one.target)
        chunks = aiter(TextGenerationServiceStub(channel).StreamGenerate(request))
        for _ in range(2 * num_sequences):
            output = (await anext(chunks)).output
            texts[output.index] += output.text
        await one.drain()

    async def read_rest() -> None:
        async for chunk in chunks:
            texts[chunk.output.index] += chunk.output.text

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read_rest()
    await channel.close()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    status = from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None
    info = pb.ResumeInfo()
    assert [detail.Unpack(info) for detail in status.details] == [False, True]

    async with grpc.aio.insecure_channel(servers[1].target) as channel:
        stub: Any = TextGenerationServiceStub(channel)
        request.sampling.seed = info.seed
        whole = await stub.Generate(request)
        request.resume_outputs.extend(info.outputs)
        request.resume_fingerprint = info.fingerprint
        rest = await stub.Generate(request)
    assert [texts[output.index] + output.text for output in rest.outputs] == [output.text for output in whole.outputs]


async def test_servers_on_the_same_model_have_the_same_fingerprint(
    servers: tuple[RunningServer, RunningServer],
) -> None:
    async with AsyncClient(servers[0].target) as one, AsyncClient(servers[1].target) as other:
        fingerprints = [(await client.get_server_info()).fingerprint for client in (one, other)]
    assert fingerprints[0] == fingerprints[1]
    names = [part.partition(":")[0] for part in fingerprints[0].split()]
    assert names == ["model", "text", "defaults", "precision", "numerics", "sampler"]
