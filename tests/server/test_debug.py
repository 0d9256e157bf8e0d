"""The state of the engine, for those who debug it."""

from __future__ import annotations

import asyncio
from typing import Any

from conftest import SteppedRunner

from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub
from mpt_grpc_client.proto.v1alpha1 import debug_pb2, debug_pb2_grpc


async def test_all_who_ask_during_one_step_get_one_message(make_service: Any, stepped: list[SteppedRunner]) -> None:
    """It takes milliseconds to make, on the event loop: hundreds would stop all streams for a second."""
    service = await make_service()
    debug: Any = debug_pb2_grpc.DebugServiceStub(service.server.channel)
    local: Any = TextGenerationServiceStub(service.server.channel)
    stepped[0].allow()
    stream = service.stub.StreamGenerate(pb.GenerateRequest(text="Once"))
    await stream.read()
    await asyncio.to_thread(stepped[0].wait_for_step)
    await asyncio.to_thread(stepped[0].wait_for_step)
    calls = [asyncio.ensure_future(debug.GetEngineState(debug_pb2.GetEngineStateRequest())) for _ in range(20)]
    # Calls are served in the order in which they arrive, and this one does not wait for the step.
    await local.GetServerInfo(pb.GetServerInfoRequest())
    stepped[0].run_free()
    first, *others = await asyncio.gather(*calls)
    assert len(first.active_requests) == 1
    assert all(other is first for other in others)
    stream.cancel()
