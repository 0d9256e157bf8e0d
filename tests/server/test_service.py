"""The service as callers see it: responses, errors with their details, health and reflection."""

from __future__ import annotations

import asyncio
import gc
import resource
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import SteppedRunner
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb


@pytest.fixture(params=["connection", "local"])
def is_local(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "local")


GREEDY = pb.SamplingParameters(temperature=0, seed=1)


def generate_request(text: str = "Once upon a time", max_new_tokens: int = 24, **fields: Any) -> pb.GenerateRequest:
    stopping = pb.StoppingCriteria(max_new_tokens=max_new_tokens, ignore_eos=True)
    return pb.GenerateRequest(**{"text": text, "sampling": GREEDY, "stopping": stopping, **fields})


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """Returns the google.rpc details of an error by type name."""
    packed = next(value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin")
    status = status_pb2.Status.FromString(packed)
    assert status.code == error.code().value[0]
    found = {}
    for detail in status.details:
        kind = getattr(error_details_pb2, detail.type_url.rpartition(".")[2])
        found[kind.__name__] = kind.FromString(detail.value)
    assert found["ErrorInfo"].domain == "mpt-grpc"
    return found


async def test_streamed_chunks_add_up_to_the_unary_response(service: Any) -> None:
    options = pb.OutputOptions(return_prompt_token_ids=True, return_token_ids=True)
    request = generate_request(max_new_tokens=40, sampling=pb.SamplingParameters(seed=5), output_options=options)
    whole = await service.stub.Generate(request)
    chunks = [chunk async for chunk in service.stub.StreamGenerate(request)]
    assert "".join(chunk.output.text for chunk in chunks) == whole.outputs[0].text
    assert [i for chunk in chunks for i in chunk.output.token_ids] == list(whole.outputs[0].token_ids)
    assert sum(chunk.output.num_tokens for chunk in chunks) == whole.outputs[0].num_tokens == 40
    assert chunks[0].prompt == whole.prompt
    assert whole.prompt.num_tokens == len(whole.prompt.token_ids)
    assert [chunk.HasField("prompt") for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.HasField("summary") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].output.finish == whole.outputs[0].finish == pb.Finish(reason=pb.FINISH_REASON_MAX_NEW_TOKENS)
    assert len({chunk.request_id for chunk in chunks}) == 1
    assert whole.summary.seed == 5
    assert whole.summary.usage.num_output_tokens == 40
    assert whole.summary.timings.time_to_first_token.ToNanoseconds() > 0
    assert whole.summary.trace_id == ""


async def test_token_ids_are_returned_only_on_request(service: Any) -> None:
    response = await service.stub.Generate(generate_request(max_new_tokens=3))
    assert not response.outputs[0].token_ids
    assert not response.prompt.token_ids


async def test_tokens_and_text_convert_both_ways(service: Any) -> None:
    text = "The fox said: “Où est la lune? 🌙”"
    tokens = (await service.stub.Tokenize(pb.TokenizeRequest(text=text))).tokens
    assert b"".join(token.token_bytes for token in tokens) == text.encode()
    ids = [token.token_id for token in tokens]
    assert (await service.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == text
    by_text = await service.stub.Generate(generate_request(text))
    by_ids = await service.stub.Generate(
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=GREEDY, stopping=generate_request().stopping)
    )
    assert by_ids.outputs[0] == by_text.outputs[0]


async def test_special_tokens_are_shown_on_request(service: Any) -> None:
    ids = [0, 260, 0]
    skipped = await service.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))
    shown = await service.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=False))
    assert shown.text == f"<|endoftext|>{skipped.text}<|endoftext|>"


async def test_every_invalid_field_is_listed_in_bad_request(service: Any) -> None:
    bad = pb.GenerateRequest(
        sampling=pb.SamplingParameters(temperature=-1, top_p=0, min_p=1.5),
        stopping=pb.StoppingCriteria(stop_strings=["a", ""], stop_token_ids=[9999999]),
        priority=1000,
    )
    for call in (service.stub.Generate(bad), anext(aiter(service.stub.StreamGenerate(bad)))):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(error)["ErrorInfo"].reason == "INVALID_REQUEST"
        assert [violation.field for violation in details(error)["BadRequest"].field_violations] == [
            "priority",
            "sampling.temperature",
            "sampling.top_p",
            "sampling.min_p",
            "stopping.stop_strings[1]",
            "stopping.stop_token_ids[0]",
            "prompt",
        ]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(text=""), "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 4096])), "token_ids.ids[1]"),
        (pb.GenerateRequest(text="word " * 5000), "text"),
        (generate_request(max_new_tokens=2048), "stopping.max_new_tokens"),
    ],
)
async def test_an_invalid_prompt_is_refused_with_its_field(service: Any, bad: pb.GenerateRequest, field: str) -> None:
    error = await failure(service.stub.Generate(bad))
    (violation,) = details(error)["BadRequest"].field_violations
    assert violation.field == field
    assert violation.description


async def test_other_methods_list_their_invalid_fields(service: Any) -> None:
    error = await failure(service.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 2, 5000])))
    assert details(error)["BadRequest"].field_violations[0].field == "token_ids[2]"
    error = await failure(service.stub.Cancel(pb.CancelRequest(request_ids=["x"] * 1001)))
    assert details(error)["BadRequest"].field_violations[0].field == "request_ids"


async def test_an_unknown_model_is_not_found(service: Any) -> None:
    error = await failure(service.stub.Generate(generate_request(model="gpt-7")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert details(error)["ErrorInfo"].reason == "UNKNOWN_MODEL"
    assert "demo" in error.details()
    assert (await service.stub.Generate(generate_request(model="demo", max_new_tokens=1))).outputs[0].num_tokens == 1


async def test_a_request_id_in_progress_already_exists(make_service: Any, stepped: list[SteppedRunner]) -> None:
    service = await make_service(max_running_requests=1, max_waiting_requests=1)
    first = service.stub.Generate(generate_request(request_id="mine"))
    await asyncio.to_thread(stepped[0].wait_for_step)
    error = await failure(service.stub.Generate(generate_request(request_id="mine")))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert details(error)["ErrorInfo"].reason == "DUPLICATE_REQUEST_ID"
    stepped[0].run_free()
    assert (await first).request_id == "mine"


async def test_a_full_queue_returns_when_to_retry(make_service: Any, stepped: list[SteppedRunner]) -> None:
    service = await make_service(max_running_requests=1, max_waiting_requests=0)
    first = service.stub.Generate(generate_request())
    await asyncio.to_thread(stepped[0].wait_for_step)
    error = await failure(service.stub.Generate(generate_request()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry_ms = details(error)["RetryInfo"].retry_delay.ToMilliseconds()
    assert 100 <= retry_ms <= 60_000
    assert details(error)["QuotaFailure"].violations[0].subject == "server:requests"
    assert ("grpc-retry-pushback-ms", str(retry_ms)) in tuple(error.trailing_metadata())
    assert not tuple(error.initial_metadata())
    stepped[0].run_free()
    assert (await first).outputs[0].num_tokens == 24


async def test_cancel_returns_the_partial_output(make_service: Any, stepped: list[SteppedRunner]) -> None:
    service = await make_service()
    unary = service.stub.Generate(generate_request(request_id="unary", max_new_tokens=1000))
    await asyncio.to_thread(stepped[0].wait_for_step)
    for _ in range(3):
        stepped[0].allow()
        await asyncio.to_thread(stepped[0].wait_for_step)
    cancelled = await service.stub.Cancel(pb.CancelRequest(request_ids=["unary", "unknown"]))
    assert list(cancelled.request_ids) == ["unary"]
    stepped[0].run_free()
    response = await unary
    assert response.outputs[0].finish.reason == pb.FINISH_REASON_CANCELLED
    assert 3 <= response.outputs[0].num_tokens <= 4
    assert not (await service.stub.Cancel(pb.CancelRequest(request_ids=["unary"]))).request_ids
    assert await service.all_blocks_free()


async def test_model_info_describes_the_model(service: Any) -> None:
    info = await service.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.name, info.dtype, info.device, info.vocab_size) == ("demo", "float32", "cpu", 4096)
    assert info.num_parameters == 7_344_384
    assert info.max_context_tokens == 2048
    assert list(info.eos_token_ids) == [0]


async def test_health_is_serving_after_the_warm_up_and_reflection_lists_the_api(service: Any) -> None:
    health = health_pb2_grpc.HealthStub(service.channel)
    for name in ("", "mpt.v1.TextGenerationService"):
        response = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    assert service.server.engine.load.num_steps >= 2
    assert await asyncio.to_thread(_reflected_services, service.server.target) == {
        "mpt.v1.TextGenerationService",
        "mpt.v1alpha1.DebugService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def _reflected_services(target: str) -> set[str]:
    with grpc.insecure_channel(target) as channel:
        return set(ProtoReflectionDescriptorDatabase(channel).get_services())


async def test_a_message_over_the_limit_is_refused_and_the_channel_stays_usable(service: Any) -> None:
    info = await service.stub.GetServerInfo(pb.GetServerInfoRequest())
    error = await failure(service.stub.Tokenize(pb.TokenizeRequest(text="x" * (info.limits.max_message_bytes + 1))))
    assert details(error)["BadRequest"].field_violations[0].field == "request"
    # 1.25 MiB is below the limit, so the engine refuses the text.
    error = await failure(service.stub.Generate(generate_request("word " * (1 << 18))))
    assert details(error)["BadRequest"].field_violations[0].field == "text"


async def test_bytes_that_are_not_a_message_are_an_invalid_request(service: Any) -> None:
    for method in ("Generate", "StreamGenerate"):
        path = f"/mpt.v1.TextGenerationService/{method}"
        call = service.channel.unary_stream(path)(b"\xff\xff\xff")
        error = await failure(anext(aiter(call)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(error)["BadRequest"].field_violations[0].field == "request"


async def test_texts_and_lists_over_their_limits_are_refused_with_the_field(service: Any) -> None:
    error = await failure(service.stub.Tokenize(pb.TokenizeRequest(text="x" * ((1 << 20) + 1))))
    assert details(error)["BadRequest"].field_violations[0].field == "text"
    error = await failure(service.stub.Tokenize(pb.TokenizeRequest(text="😀" * 40_000)))
    assert "tokens; at most 131072 are returned" in details(error)["BadRequest"].field_violations[0].description
    error = await failure(service.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1] * ((1 << 18) + 1))))
    assert details(error)["BadRequest"].field_violations[0].field == "token_ids"


async def test_a_thousand_open_streams_all_finish_and_leave_nothing(make_service: Any) -> None:
    service = await make_service(max_running_requests=64, max_waiting_requests=1000)

    async def read() -> int:
        stream = service.stub.StreamGenerate(generate_request(max_new_tokens=2))
        return sum([chunk.output.num_tokens async for chunk in stream])

    async def growth() -> int:
        """Returns by how many bytes a thousand streams make the process larger."""
        before = _memory_bytes()
        assert await asyncio.gather(*(read() for _ in range(1000))) == [2] * 1000
        assert await service.all_blocks_free()
        return _memory_bytes() - before

    await growth()  # allocates what the others use again
    # Allocators keep more of some rounds than of others; a leak is in all.
    growths = [await growth()]
    while growths[-1] >= 16 << 20 and len(growths) < 4:
        growths.append(await growth())
    assert min(growths) < 16 << 20


def _memory_bytes() -> int:
    """Returns the size of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
