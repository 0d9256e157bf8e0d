"""How a server stops taking work, and what health says of an engine that stands still or has died."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import pytest
from conftest import SteppedRunner, demo_settings
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mpt_grpc.engine import load
from mpt_grpc.schedule.scheduler import Progress, Scheduler
from mpt_grpc.server.server import running_server
from mpt_grpc.settings import ServerSettings, Settings
from mpt_grpc.step import StepPlan, StepResult
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def server_settings(**changes: Any) -> Settings:
    return replace(demo_settings(), server=ServerSettings(grpc_port=0, **changes))


def asked(max_new_tokens: int, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="Once upon a time",
        sampling=pb.SamplingParameters(temperature=0),
        stopping=pb.StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True),
        **fields,
    )


async def unavailable(call: Any, reason: str) -> str:
    """Awaits a call that must fail with UNAVAILABLE for this reason, and returns the message."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    packed = next(value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin")
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(packed).details[0].Unpack(info)
    assert (info.domain, info.reason) == ("mpt-grpc", reason)
    return error.details()


class Watch:
    """An open Health.Watch."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        request = health_pb2.HealthCheckRequest(service="mpt.v1.TextGenerationService")
        self.call = health_pb2_grpc.HealthStub(channel).Watch(request)
        self._changes = aiter(self.call)

    async def until(self, status: int) -> None:
        while (await anext(self._changes)).status != status:
            pass


async def test_a_drain_refuses_new_work_and_lets_a_running_stream_finish(
    make_service: Any, stepped: list[SteppedRunner]
) -> None:
    service = await make_service()
    watch = Watch(service.channel)
    await watch.until(SERVING)
    call = service.stub.StreamGenerate(asked(50))
    await asyncio.to_thread(stepped[0].wait_for_step)

    drain = asyncio.create_task(service.server.drain())
    await watch.until(NOT_SERVING)
    assert "shutting down" in await unavailable(service.stub.Generate(asked(1)), "DRAINING")
    assert "shutting down" in await unavailable(anext(aiter(service.stub.StreamGenerate(asked(1)))), "DRAINING")
    everything = await health_pb2_grpc.HealthStub(service.channel).Check(health_pb2.HealthCheckRequest())
    assert everything.status == NOT_SERVING
    assert not drain.done()

    stepped[0].run_free()
    pieces = [piece async for piece in call]
    assert sum(piece.output.num_tokens for piece in pieces) == 50
    assert pieces[-1].output.finish.reason == pb.FINISH_REASON_MAX_NEW_TOKENS
    await drain


async def test_an_open_health_watch_does_not_hold_a_stop_up() -> None:
    # If the watch were waited for, the stop would take longer than a test may.
    settings = server_settings(grace_s=3600)
    async with running_server(settings) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = Watch(channel)
        await watch.until(SERVING)
        await server.drain()
        await watch.until(NOT_SERVING)


@pytest.mark.parametrize("how", ["the grace is over", "a second signal"])
async def test_what_still_runs_is_ended_when(how: str) -> None:
    settings = server_settings(grace_s=0 if how == "the grace is over" else 3600)
    hurry = asyncio.Event()
    async with running_server(settings) as server:
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        pieces = aiter(TextGenerationServiceStub(channel).StreamGenerate(asked(2000)))
        await anext(pieces)
        if how == "a second signal":
            hurry.set()
        await server.drain(hurry)
        assert server.engine.num_in_flight == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in pieces:
            pass
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert server.engine.num_in_flight == 0
    await channel.close()


async def test_health_says_when_work_stands_still_and_when_it_moves_on(
    make_service: Any, stepped: list[SteppedRunner]
) -> None:
    service = await make_service(server_settings(stall_timeout_s=0.2))
    watch = Watch(service.channel)
    await watch.until(SERVING)
    call = service.stub.Generate(asked(1))
    await watch.until(NOT_SERVING)
    stepped[0].run_free()
    assert (await call).outputs[0].num_tokens == 1
    await watch.until(SERVING)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", [RuntimeError, SystemExit])
async def test_health_says_when_the_engine_has_died_and_calls_end(
    make_service: Any, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    monkeypatch.setattr(MortalScheduler, "fault", fault)
    monkeypatch.setattr(load, "Scheduler", MortalScheduler)
    service = await make_service()
    watch = Watch(service.channel)
    await watch.until(SERVING)
    unary, stream = service.stub.Generate(asked(50)), service.stub.StreamGenerate(asked(50, request_id="deadly"))
    assert "has stopped" in await unavailable(unary, "ENGINE_STOPPED")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await watch.until(NOT_SERVING)
    assert "has stopped" in await unavailable(service.stub.Generate(asked(1)), "ENGINE_STOPPED")


class MortalScheduler(Scheduler):
    """A scheduler with a fault that is nobody's request's: it breaks once two requests run, one of them named so."""

    fault: type[BaseException] = RuntimeError

    def commit(self, plan: StepPlan, result: StepResult) -> list[Progress]:
        if len(plan.sequences) == 2 and any(sequence.request_id == "deadly" for sequence in plan.sequences):
            raise self.fault("the books do not balance")
        return super().commit(plan, result)
