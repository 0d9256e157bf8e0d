"""Requests that end early by cancellation, disconnection or deadline, and free their memory before the next step."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from conftest import SteppedRunner, demo_settings, generation

from mpt_grpc.engine.stream import AsyncStream
from mpt_grpc.step import SequenceStep, StepPlan
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

MAX_STEP_TOKENS = 32
LONG_PROMPT = [300 + i for i in range(100)]
"""A prompt that takes four steps to compute."""
DEADLINE_S = 2.0


@pytest.fixture(params=["connection", "local"])
def is_local(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "local")


def generate_request(prompt: list[int], max_new_tokens: int = 500, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParameters(temperature=0),
        stopping=pb.StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True),
        output_options=pb.OutputOptions(return_token_ids=True),
        **fields,
    )


def _position(step: SequenceStep | None) -> int | None:
    """Returns how many tokens were sampled before the one that this step samples."""
    return None if step is None or not step.choices else step.output_position


async def step_until(runner: SteppedRunner, condition: Callable[[StepPlan], bool]) -> StepPlan:
    """Lets the engine compute steps until a plan meets the condition, and returns this plan, not yet computed."""
    plan = await asyncio.to_thread(runner.wait_for_step)
    while not condition(plan):
        runner.allow()
        plan = await asyncio.to_thread(runner.wait_for_step)
    return plan


def leaving_step(plan: StepPlan) -> Any:
    """Returns the step of the leaving request's sequence, or None if the plan does not contain it."""
    return next((sequence for sequence in plan.sequences if sequence.request_id == "leaving"), None)


@pytest.mark.parametrize("way", ["cancel", "disconnect", "deadline"])
@pytest.mark.parametrize("state", ["waiting", "mid-prefill", "running"])
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
async def test_a_request_that_ends_early_frees_its_blocks_before_the_next_step(
    make_service: Any, stepped: list[SteppedRunner], method: str, state: str, way: str
) -> None:
    num_blocks = 64
    max_running_requests = 1 if state == "waiting" else 2
    service = await make_service(
        num_blocks=num_blocks, max_running_requests=max_running_requests, max_step_tokens=MAX_STEP_TOKENS
    )
    engine, runner = service.server.engine, stepped[0]
    # Submitted to the engine directly, so that the server serves no call except the one that ends early.
    staying = engine.submit(generation("staying", (7,), max_new_tokens=500), AsyncStream)

    call = getattr(service.stub, method)(
        generate_request(LONG_PROMPT, request_id="leaving"), timeout=DEADLINE_S if way == "deadline" else None
    )
    ended = asyncio.ensure_future(call if method == "Generate" else anext(aiter(call)))
    reached: Callable[[StepPlan], bool] = {
        "waiting": lambda _: engine.load.num_waiting == 1,
        "mid-prefill": lambda plan: leaving_step(plan) is not None and leaving_step(plan).start > 0,
        "running": lambda plan: _position(leaving_step(plan)) == 2,
    }[state]
    plan = await step_until(runner, reached)
    assert (leaving_step(plan) is None) == (state == "waiting")

    if way == "cancel":
        call.cancel()
    elif way == "disconnect":
        await service.channel.close()
    # A drain waits until no call is in progress, and thus until the server has noticed the end of this one.
    await service.server.drain()
    runner.allow()
    after = await asyncio.to_thread(runner.wait_for_step)

    assert [sequence.request_id for sequence in after.sequences] == ["staying"]
    assert engine.num_in_flight == 1
    staying_step = next(sequence for sequence in plan.sequences if sequence.request_id == "staying")
    assert engine.load.num_free_blocks == num_blocks - len(staying_step.block_table)
    engine.cancel("staying")
    runner.run_free()
    async for _ in staying:
        pass
    assert engine.load.num_free_blocks == num_blocks
    await asyncio.wait([ended])


async def test_cancelling_a_finished_stream_does_not_cancel_a_new_request_with_its_id(
    make_service: Any, stepped: list[SteppedRunner]
) -> None:
    # The chunks exceed the HTTP/2 window, so the server is still sending after the engine has finished the request.
    service = await make_service(options=[("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0)])
    name, runner = "same".ljust(128, "."), stepped[0]
    first = service.stub.StreamGenerate(generate_request([300], max_new_tokens=300, request_id=name))
    await step_until(runner, lambda plan: _position(plan.sequences[0]) == 299)
    runner.allow()
    other = generation("other", max_new_tokens=1)
    service.server.engine.submit(other, AsyncStream)
    await step_until(runner, lambda plan: plan.sequences[0].request_id == "other")
    second = asyncio.ensure_future(service.stub.Generate(generate_request([400], max_new_tokens=20, request_id=name)))
    runner.allow()
    await step_until(runner, lambda plan: plan.sequences[0].request_id == name)

    first.cancel()
    await service.stub.GetServerInfo(pb.GetServerInfoRequest())  # sent on the same connection after the cancellation
    runner.run_free()
    assert (await second).outputs[0].finish.reason == pb.FINISH_REASON_MAX_NEW_TOKENS


async def test_a_deadline_ends_a_stream_after_the_tokens_generated_so_far(
    make_service: Any, stepped: list[SteppedRunner]
) -> None:
    service = await make_service()
    call = service.stub.StreamGenerate(generate_request([300], request_id="leaving"), timeout=DEADLINE_S)
    await step_until(stepped[0], lambda plan: _position(plan.sequences[0]) == 4)
    received: list[int] = []

    async def read() -> None:
        async for chunk in call:
            received.extend(chunk.output.token_ids)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    stepped[0].run_free()
    whole = await service.stub.Generate(generate_request([300], max_new_tokens=4))
    assert received == list(whole.outputs[0].token_ids)


async def test_remaining_streams_are_correct_while_others_end_early_and_memory_is_short(
    make_service: Any, service: Any
) -> None:
    rng = random.Random(5)
    requests = [
        generate_request([300 + i, 400, 500 + i], max_new_tokens=rng.randint(12, 32), request_id=f"r{i}")
        for i in range(32)
    ]
    ways = [rng.choice(["stay", "stay", "cancel", "deadline", "cancel_rpc"]) for _ in requests]
    numbers_of_chunks = [rng.randint(1, 12) for _ in requests]
    alone = [list((await service.stub.Generate(request)).outputs[0].token_ids) for request in requests]

    crowded = await make_service(num_blocks=16)

    async def stream(
        request: pb.GenerateRequest, way: str, num_chunks: int
    ) -> tuple[list[int], pb.Summary | None, grpc.StatusCode]:
        """Reads a stream to its end, which for every way but "stay" comes after about `num_chunks` chunks."""
        call = crowded.stub.StreamGenerate(request, timeout=num_chunks / 20 if way == "deadline" else None)
        token_ids: list[int] = []
        summary = None
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for chunk in call:
                token_ids += chunk.output.token_ids
                summary = chunk.summary if chunk.HasField("summary") else None
                num_chunks -= 1
                if num_chunks == 0 and way == "cancel":
                    call.cancel()
                if num_chunks == 0 and way == "cancel_rpc":
                    await crowded.stub.Cancel(pb.CancelRequest(request_ids=[request.request_id]))
        return token_ids, summary, await call.code()

    outcomes = await asyncio.gather(*map(stream, requests, ways, numbers_of_chunks))
    # While others wait, a call is refused as soon as it would end too late.
    too_late = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    allowed = {"cancel": (grpc.StatusCode.CANCELLED,), "deadline": too_late}
    for expected, way, (token_ids, _, code) in zip(alone, ways, outcomes, strict=True):
        assert token_ids == (expected if way == "stay" else expected[: len(token_ids)])
        assert code in (grpc.StatusCode.OK, *allowed.get(way, ()))
    assert sum(summary.usage.num_preemptions for _, summary, _ in outcomes if summary is not None) > 0
    assert {"stay", "cancel", "deadline", "cancel_rpc"} == set(ways)
    assert await crowded.all_blocks_free()


async def test_a_caller_who_reads_nothing_gets_the_output_in_a_few_pieces_later(make_service: Any) -> None:
    """What waits for a reader is at most one message per output, and the output itself."""
    service = await make_service()
    stream = service.server.engine.submit(generation("slow", (5,), max_new_tokens=1000), AsyncStream)
    deltas = aiter(stream)
    await anext(deltas)
    while service.server.engine.num_in_flight:
        await asyncio.to_thread(service.server.engine.state().result)
    await service.stub.GetServerInfo(pb.GetServerInfoRequest())
    rest = [delta async for delta in deltas]
    assert len(rest) <= 2
    assert 990 < sum(len(delta.token_ids) for delta in rest) < 1000


async def test_waiting_on_the_event_loop_for_its_own_outputs_is_refused(service: Any) -> None:
    with pytest.raises(RuntimeError, match="use another thread"):
        service.server.engine.generate(generation())


async def busy_service(make_service: Any, runner_of: list[SteppedRunner]) -> Any:
    """Returns a server with a context of 8,000 tokens, of whose requests one runs and one waits, and that has measured
    how long a token takes."""
    settings = demo_settings(max_running_requests=1)
    service = await make_service(replace(settings, model=replace(settings.model, max_context_tokens=8000)))
    runner = runner_of[0]
    for _ in range(8):
        for _ in range(2):
            runner.allow()
        await service.stub.Generate(generate_request([300], max_new_tokens=2))
        for _ in range(2):
            runner.wait_for_step()
    for name in ("running", "waiting"):
        service.server.engine.submit(generation(name, max_new_tokens=2000), AsyncStream)
    await step_until(runner, lambda _: service.server.engine.load.num_waiting == 1)
    return service


async def test_a_call_whose_deadline_cannot_be_met_is_refused_while_others_wait(
    make_service: Any, stepped: list[SteppedRunner]
) -> None:
    service = await busy_service(make_service, stepped)
    late = generate_request([300], max_new_tokens=7999)
    with pytest.raises(grpc.aio.AioRpcError, match="its timeout leaves") as refused:
        await service.stub.Generate(late, timeout=DEADLINE_S)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    limited = generate_request([300], max_new_tokens=7999)
    limited.stopping.time_limit.FromSeconds(1)
    ended = asyncio.ensure_future(service.stub.Generate(limited, timeout=60))
    stepped[0].allow()
    await step_until(stepped[0], lambda _: service.server.engine.load.num_waiting == 2)
    stepped[0].run_free()
    assert (await ended).outputs[0].finish.reason == pb.FINISH_REASON_TIME_LIMIT
