"""A caller who leaves: whatever the request was doing, it is gone before the next step and its memory with it."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from conftest import SteppedRunner, generation

from mpt_grpc.engine.stream import AsyncStream
from mpt_grpc.step import SequenceStep, StepPlan
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

CHUNK = 32
LONG_PROMPT = [300 + i for i in range(100)]
"""Four chunks."""
DEADLINE_S = 2.0


def asked(prompt: list[int], max_new_tokens: int = 500, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParameters(temperature=0),
        stopping=pb.StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True),
        output_options=pb.OutputOptions(return_token_ids=True),
        **fields,
    )


def _position(step: SequenceStep | None) -> int | None:
    """How many tokens were chosen before the one that this step chooses."""
    return None if step is None or step.sampling is None else step.sampling.output_position


async def step_until(runner: SteppedRunner, condition: Callable[[StepPlan], bool]) -> StepPlan:
    """Lets the engine compute, step by step, until a plan is as wished; it is not computed yet."""
    plan = await asyncio.to_thread(runner.wait_for_step)
    while not condition(plan):
        runner.allow()
        plan = await asyncio.to_thread(runner.wait_for_step)
    return plan


def leaver(plan: StepPlan) -> Any:
    """The leaver's share of a step, if it has one."""
    return next((sequence for sequence in plan.sequences if sequence.request_id == "leaver"), None)


@pytest.mark.parametrize("way", ["cancel", "disconnect", "deadline"])
@pytest.mark.parametrize("state", ["waiting", "mid-prefill", "running"])
@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
async def test_a_request_that_is_left_is_gone_with_its_blocks_within_a_step(
    make_service: Any, stepped: list[SteppedRunner], method: str, state: str, way: str
) -> None:
    num_blocks = 64
    max_running_requests = 1 if state == "waiting" else 2
    service = await make_service(
        num_blocks=num_blocks, max_running_requests=max_running_requests, max_step_tokens=CHUNK
    )
    engine, runner = service.server.engine, stepped[0]
    # It goes to the engine directly, so that the leaver's call is the only one that the server answers.
    stays = engine.submit(engine.preparation.prepare(generation("stays", (7,), max_new_tokens=500)), AsyncStream)

    call = getattr(service.stub, method)(
        asked(LONG_PROMPT, request_id="leaver"), timeout=DEADLINE_S if way == "deadline" else None
    )
    ended = asyncio.ensure_future(call if method == "Generate" else anext(aiter(call)))
    reached: Callable[[StepPlan], bool] = {
        "waiting": lambda _: engine.load.num_waiting == 1,
        "mid-prefill": lambda plan: leaver(plan) is not None and leaver(plan).start > 0,
        "running": lambda plan: _position(leaver(plan)) == 2,
    }[state]
    plan = await step_until(runner, reached)
    assert (leaver(plan) is None) == (state == "waiting")

    if way == "cancel":
        call.cancel()
    elif way == "disconnect":
        await service.channel.close()
    # A drain waits until no call is being answered, which is the server's word that it has seen the leaver go.
    await service.server.drain()
    runner.allow()
    after = await asyncio.to_thread(runner.wait_for_step)

    assert [sequence.request_id for sequence in after.sequences] == ["stays"]
    assert engine.num_in_flight == 1
    staying = next(sequence for sequence in plan.sequences if sequence.request_id == "stays")
    assert engine.load.num_free_blocks == num_blocks - len(staying.block_table)
    engine.cancel("stays")
    runner.run_free()
    async for _ in stays:
        pass
    assert engine.load.num_free_blocks == num_blocks
    await asyncio.wait([ended])


async def test_leaving_an_ended_stream_spares_the_next_request_of_its_id(
    make_service: Any, stepped: list[SteppedRunner]
) -> None:
    # More than the window of HTTP/2 holds, so that the server still answers when the engine has long ended the request.
    service = await make_service(options=[("grpc.http2.lookahead_bytes", 16_384), ("grpc.http2.bdp_probe", 0)])
    name, runner = "same".ljust(128, "."), stepped[0]
    first = service.stub.StreamGenerate(asked([300], max_new_tokens=300, request_id=name))
    await step_until(runner, lambda plan: _position(plan.sequences[0]) == 299)
    runner.allow()
    follower = generation("follower", max_new_tokens=1)
    service.server.engine.submit(service.server.engine.preparation.prepare(follower), AsyncStream)
    await step_until(runner, lambda plan: plan.sequences[0].request_id == "follower")
    second = asyncio.ensure_future(service.stub.Generate(asked([400], max_new_tokens=20, request_id=name)))
    runner.allow()
    await step_until(runner, lambda plan: plan.sequences[0].request_id == name)

    first.cancel()
    await service.stub.GetServerInfo(pb.GetServerInfoRequest())  # goes the same way, behind the cancel
    runner.run_free()
    assert (await second).outputs[0].finish.reason == pb.FINISH_REASON_MAX_NEW_TOKENS


async def test_a_deadline_cuts_a_stream_after_the_text_that_was_there(
    make_service: Any, stepped: list[SteppedRunner]
) -> None:
    service = await make_service()
    call = service.stub.StreamGenerate(asked([300], request_id="leaver"), timeout=DEADLINE_S)
    await step_until(stepped[0], lambda plan: _position(plan.sequences[0]) == 4)
    received: list[int] = []

    async def read() -> None:
        async for piece in call:
            received.extend(piece.output.token_ids)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    stepped[0].run_free()
    whole = await service.stub.Generate(asked([300], max_new_tokens=4))
    assert received == list(whole.outputs[0].token_ids)


async def test_streams_that_stay_are_right_while_others_leave_and_memory_is_short(
    make_service: Any, service: Any
) -> None:
    fates = random.Random(5)
    requests = [
        asked([300 + i, 400, 500 + i], max_new_tokens=fates.randint(12, 32), request_id=f"r{i}") for i in range(32)
    ]
    ways = [fates.choice(["stay", "stay", "cancel", "deadline", "cancel_rpc"]) for _ in requests]
    patience = [fates.randint(1, 12) for _ in requests]
    alone = [list((await service.stub.Generate(request)).outputs[0].token_ids) for request in requests]

    crowded = await make_service(num_blocks=16)

    async def stream(
        request: pb.GenerateRequest, way: str, num_pieces: int
    ) -> tuple[list[int], pb.Summary | None, grpc.StatusCode]:
        """Reads until the end that its way gives it; `num_pieces` is how many it waits for before it leaves."""
        call = crowded.stub.StreamGenerate(request, timeout=num_pieces / 20 if way == "deadline" else None)
        token_ids: list[int] = []
        summary = None
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for piece in call:
                token_ids += piece.output.token_ids
                summary = piece.summary if piece.HasField("summary") else None
                num_pieces -= 1
                if num_pieces == 0 and way == "cancel":
                    call.cancel()
                if num_pieces == 0 and way == "cancel_rpc":
                    await crowded.stub.Cancel(pb.CancelRequest(request_ids=[request.request_id]))
        return token_ids, summary, await call.code()

    outcomes = await asyncio.gather(*map(stream, requests, ways, patience))
    allowed = {"cancel": grpc.StatusCode.CANCELLED, "deadline": grpc.StatusCode.DEADLINE_EXCEEDED}
    for expected, way, (token_ids, _, code) in zip(alone, ways, outcomes, strict=True):
        assert token_ids == (expected if way == "stay" else expected[: len(token_ids)])
        assert code in (grpc.StatusCode.OK, allowed.get(way))
    assert sum(summary.usage.num_preemptions for _, summary, _ in outcomes if summary is not None) > 0
    assert {"stay", "cancel", "deadline", "cancel_rpc"} == set(ways)
    assert await crowded.all_blocks_free()
