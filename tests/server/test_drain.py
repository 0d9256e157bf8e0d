"""How a server shuts down, and the health it reports when the engine has stalled or stopped."""

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
from mpt_grpc.results import TokenEvent
from mpt_grpc.schedule.scheduler import Scheduler
from mpt_grpc.schedule.sequence import Sequence
from mpt_grpc.server.server import running_server
from mpt_grpc.settings import ServerSettings, Settings
from mpt_grpc.step import StepPlan, StepResult
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def server_settings(**changes: Any) -> Settings:
    return replace(demo_settings(), server=ServerSettings(grpc_port=0, **changes))


def generate_request(max_new_tokens: int, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="Once upon a time",
        sampling=pb.SamplingParameters(temperature=0),
        stopping=pb.StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True),
        **fields,
    )


async def unavailable_message(call: Any, reason: str) -> str:
    """Returns the message of a call that must fail with UNAVAILABLE and this reason."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    packed = next(value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin")
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(packed).details[0].Unpack(info)
    assert (info.domain, info.reason) == ("mpt-grpc", reason)
    return error.details()


class HealthWatch:
    """An open call of `Health.Watch`."""

    def __init__(self, channel: grpc.aio.Channel, service: str = "mpt.v1.TextGenerationService") -> None:
        request = health_pb2.HealthCheckRequest(service=service)
        self.call = health_pb2_grpc.HealthStub(channel).Watch(request)
        self._changes = aiter(self.call)

    async def until(self, status: int) -> None:
        while (await anext(self._changes)).status != status:
            pass


async def test_a_drain_refuses_new_requests_and_lets_a_running_stream_finish(
    make_service: Any, stepped: list[SteppedRunner]
) -> None:
    service = await make_service()
    watch = HealthWatch(service.channel)
    await watch.until(SERVING)
    call = service.stub.StreamGenerate(generate_request(50))
    await asyncio.to_thread(stepped[0].wait_for_step)

    drain = asyncio.create_task(service.server.drain())
    await watch.until(NOT_SERVING)
    assert "shutting down" in await unavailable_message(service.stub.Generate(generate_request(1)), "DRAINING")
    stream = aiter(service.stub.StreamGenerate(generate_request(1)))
    assert "shutting down" in await unavailable_message(anext(stream), "DRAINING")
    health = health_pb2_grpc.HealthStub(service.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
    assert (await health.Check(health_pb2.HealthCheckRequest(service="live"))).status == SERVING
    assert not drain.done()

    stepped[0].run_free()
    chunks = [chunk async for chunk in call]
    assert sum(chunk.output.num_tokens for chunk in chunks) == 50
    assert chunks[-1].output.finish.reason == pb.FINISH_REASON_MAX_NEW_TOKENS
    await drain


async def test_an_open_health_watch_does_not_delay_the_shutdown() -> None:
    # If the drain waited for the watch, the test would time out.
    settings = server_settings(grace_s=3600)
    async with running_server(settings) as server, grpc.aio.insecure_channel(server.target) as channel:
        watch = HealthWatch(channel)
        await watch.until(SERVING)
        await server.drain()
        await watch.until(NOT_SERVING)


@pytest.mark.parametrize("ended_by", ["the grace period", "a second signal"])
async def test_remaining_requests_are_cancelled_after(ended_by: str) -> None:
    settings = server_settings(grace_s=0 if ended_by == "the grace period" else 3600)
    stop = asyncio.Event()
    async with running_server(settings) as server:
        channel = grpc.aio.insecure_channel(server.target)
        chunks = aiter(TextGenerationServiceStub(channel).StreamGenerate(generate_request(2000)))
        await anext(chunks)
        if ended_by == "a second signal":
            stop.set()
        await server.drain(stop)
        assert server.engine.num_in_flight == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in chunks:
            pass
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert server.engine.num_in_flight == 0
    await channel.close()


async def test_health_reports_a_stalled_engine_and_its_recovery(
    make_service: Any, stepped: list[SteppedRunner]
) -> None:
    service = await make_service(server_settings(stall_timeout_s=0.2))
    watch = HealthWatch(service.channel)
    await watch.until(SERVING)
    call = service.stub.Generate(generate_request(1))
    await watch.until(NOT_SERVING)
    live = HealthWatch(service.channel, "live")
    await live.until(NOT_SERVING)
    stepped[0].run_free()
    assert (await call).outputs[0].num_tokens == 1
    await watch.until(SERVING)
    await live.until(SERVING)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", [RuntimeError, SystemExit])
async def test_calls_fail_and_health_changes_when_the_engine_stops(
    make_service: Any, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    monkeypatch.setattr(FailingScheduler, "fault", fault)
    monkeypatch.setattr(load, "Scheduler", FailingScheduler)
    service = await make_service()
    watch = HealthWatch(service.channel)
    await watch.until(SERVING)
    unary = service.stub.Generate(generate_request(50))
    stream = service.stub.StreamGenerate(generate_request(50, request_id="fatal"))
    assert "has stopped" in await unavailable_message(unary, "ENGINE_STOPPED")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await watch.until(NOT_SERVING)
    assert "has stopped" in await unavailable_message(service.stub.Generate(generate_request(1)), "ENGINE_STOPPED")


class FailingScheduler(Scheduler):
    """A scheduler that fails for no request's fault: in a step with two requests, one of them named 'fatal'."""

    fault: type[BaseException] = RuntimeError

    def commit(
        self, plan: StepPlan, result: StepResult, seconds: float | None = None
    ) -> list[tuple[Sequence, TokenEvent]]:
        if len(plan.sequences) == 2 and any(sequence.request_id == "fatal" for sequence in plan.sequences):
            raise self.fault("inconsistent state")
        return super().commit(plan, result, seconds)
