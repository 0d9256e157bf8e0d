"""The log has one line for each call, whatever the caller sends."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import grpc
import pytest
from conftest import demo_settings

from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1alpha1 import debug_pb2
from mpt_grpc_client.proto.v1alpha1.debug_pb2_grpc import DebugServiceStub


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "mpt_grpc.access")
    return caplog


def generate_request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Once", stopping=pb.StoppingCriteria(max_new_tokens=3, ignore_eos=True), **fields)


async def test_a_call_is_logged_with_its_status_request_and_tokens(service: Any, log: Any) -> None:
    await service.stub.Generate(generate_request(request_id="order-17"))
    assert [chunk async for chunk in service.stub.StreamGenerate(generate_request(request_id="order-18"))]
    unary, stream = [record.getMessage() for record in log.records]
    for line, method, request_id in ((unary, "Generate", "order-17"), (stream, "StreamGenerate", "order-18")):
        assert line.startswith(f"{method} OK ")
        assert f"request_id='{request_id}'" in line
        assert re.search(
            r" cached_tokens=0 queue_s=0\.\d+ first_token_s=0\.\d+ preemptions=0"
            r" prompt_tokens=1 output_tokens=3 finish='max_new_tokens'$",
            line,
        )


async def test_a_failed_call_is_logged_with_its_error_in_one_bounded_line(service: Any, log: Any) -> None:
    forged = "x\nGenerate OK" + "y" * 1000
    with pytest.raises(grpc.aio.AioRpcError):
        await service.stub.Generate(generate_request(model=forged))
    (record,) = log.records
    line = record.getMessage()
    assert line.startswith("Generate NOT_FOUND ")
    assert "\n" not in line
    assert len(line) < 500


@pytest.mark.parametrize(
    ("template", "logged"),
    [
        ("\n{{ {'a': 1}[messages[0].content].b }}", "UndefinedError on line 2"),
        ("\n{{ raise_exception(messages[0].content) }}", "refused by the model's chat template on line 2"),
    ],
)
async def test_an_error_of_the_template_is_logged_without_what_it_quotes_and_sent_with_it(
    make_service: Any, log: Any, template: str, logged: str
) -> None:
    settings = demo_settings()
    service = await make_service(replace(settings, model=replace(settings.model, chat_template=template)))
    message = pb.Message(role=pb.ROLE_USER, content="a silver key")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.stub.Generate(pb.GenerateRequest(conversation=pb.Conversation(messages=[message])))
    assert "a silver key" in (refused.value.details() or "")
    (line,) = [record.getMessage() for record in log.records]
    assert logged in line
    assert "silver" not in line
    assert "prompt_tokens" not in line


async def test_a_cancelled_call_is_logged(make_service: Any, log: Any) -> None:
    service = await make_service()
    stopping = pb.StoppingCriteria(max_new_tokens=1500, ignore_eos=True)
    call = service.stub.StreamGenerate(pb.GenerateRequest(text="Once", stopping=stopping))
    await anext(aiter(call))
    call.cancel()
    await service.server.drain()  # waits until no call is in progress
    (line,) = [record.getMessage() for record in log.records]
    assert line.startswith("StreamGenerate CANCELLED ")
    assert "peer=ipv4:127.0.0.1:" in line


async def test_periodic_calls_are_logged_only_at_debug_level(service: Any, log: Any) -> None:
    debug = DebugServiceStub(service.channel)
    await debug.GetEngineState(debug_pb2.GetEngineStateRequest())
    assert not log.records
    log.set_level(logging.DEBUG, "mpt_grpc.access")
    await debug.GetEngineState(debug_pb2.GetEngineStateRequest())
    assert [record.getMessage().split()[:2] for record in log.records] == [["GetEngineState", "OK"]]
