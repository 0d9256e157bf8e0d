"""The state of the engine, for those who debug it."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from conftest import SteppedRunner

from mpt_grpc.engine.state import EngineState
from mpt_grpc.server import convert
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub
from mpt_grpc_client.proto.v1alpha1 import debug_pb2, debug_pb2_grpc


async def test_all_who_ask_during_one_step_get_one_message(
    make_service: Any, stepped: list[SteppedRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes milliseconds to make, on the event loop: hundreds would stop all streams for a second."""
    service, made = await make_service(), list[debug_pb2.GetEngineStateResponse]()
    convert_state = convert.engine_state

    def counted(*parts: Any) -> debug_pb2.GetEngineStateResponse:
        made.append(convert_state(*parts))
        return made[-1]

    monkeypatch.setattr(convert, "engine_state", counted)
    debug: Any = debug_pb2_grpc.DebugServiceStub(service.server.channel)
    local: Any = TextGenerationServiceStub(service.server.channel)
    stepped[0].allow()
    endless = pb.StoppingCriteria(ignore_eos=True)
    stream = service.stub.StreamGenerate(pb.GenerateRequest(text="Once", stopping=endless))
    await stream.read()
    await asyncio.to_thread(stepped[0].wait_for_step)
    await asyncio.to_thread(stepped[0].wait_for_step)
    calls = [asyncio.ensure_future(debug.GetEngineState(debug_pb2.GetEngineStateRequest())) for _ in range(20)]
    remote: Any = debug_pb2_grpc.DebugServiceStub(service.channel)
    calls.append(asyncio.ensure_future(remote.GetEngineState(debug_pb2.GetEngineStateRequest())))
    # Calls are served in the order in which they arrive, and these do not wait for the step.
    for stub in (service.stub, local):
        await stub.GetServerInfo(pb.GetServerInfoRequest())
    stepped[0].run_free()
    first, *others = await asyncio.gather(*calls)
    assert len(first.active_requests) == 1
    assert all(other == first for other in others)
    assert made == [first]
    stream.cancel()


async def test_the_state_is_not_kept_once_it_has_been_shown(make_service: Any) -> None:
    service, before = await make_service(), num_states()
    debug: Any = debug_pb2_grpc.DebugServiceStub(service.server.channel)
    await debug.GetEngineState(debug_pb2.GetEngineStateRequest())
    await service.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert num_states() == before


def num_states() -> int:
    gc.collect()
    return sum(type(value) is EngineState for value in gc.get_objects())
