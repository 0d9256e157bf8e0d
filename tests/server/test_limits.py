"""Every field has a limit, which is checked on the message before anything else, and no error is too long to arrive."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status.rpc_status import from_call

from mpt_grpc.limits import MAX_BYTES, MAX_COUNTS, MAX_TOKEN_IDS, RANGES
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

VOCAB, CONTEXT = 4096, 2048


def request(**fields: Any) -> pb.GenerateRequest:
    """Returns a request for one token."""
    message = pb.GenerateRequest(text="Once", stopping=pb.StoppingCriteria(max_new_tokens=1))
    message.MergeFrom(pb.GenerateRequest(**fields))
    return message


def conversation(count: int) -> pb.GenerateRequest:
    turns = [pb.Message(role=pb.ROLE_USER, content="x")] * count
    return request(conversation=pb.Conversation(messages=turns, drop_oldest_turns=True))


def with_tools(**fields: Any) -> pb.GenerateRequest:
    turns = [pb.Message(role=pb.ROLE_USER, content="x")]
    return request(conversation=pb.Conversation(messages=turns, tool_choice=pb.TOOL_CHOICE_NONE, **fields))


def called(count: int, size: int = 1, **call: Any) -> pb.GenerateRequest:
    """Returns a request whose messages have that many calls together, with arguments of that size."""
    half = [pb.ToolCall(name="f", arguments="1" * size, **call)] * (count // 2)
    rest = [pb.ToolCall(name="f", arguments="1" * size, **call)] * (count - count // 2)
    turns = [pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=calls) for calls in (half, rest)]
    turns.append(pb.Message(role=pb.ROLE_USER, content="x"))
    return request(conversation=pb.Conversation(messages=turns, drop_oldest_turns=True))


def resumed(count: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5]),
        resume_token_ids=[5] * count,
        sampling=pb.SamplingParameters(temperature=0),
        stopping=pb.StoppingCriteria(max_new_tokens=CONTEXT - 1, ignore_eos=True),
    )


def resumed_outputs(token_ids: list[list[int]]) -> pb.GenerateRequest:
    outputs = [pb.PartialOutput(index=index, token_ids=ids) for index, ids in enumerate(token_ids)]
    return request(resume_outputs=outputs, sampling=pb.SamplingParameters(seed=1, num_sequences=16))


def decoding(**fields: Any) -> pb.GenerateRequest:
    return request(decoding=pb.DecodingOptions(**fields))


def stopping(**fields: Any) -> pb.GenerateRequest:
    return request(stopping=pb.StoppingCriteria(max_new_tokens=1, **fields))


COUNTED = {
    "token_ids.ids": (CONTEXT - 1, lambda n: request(token_ids=pb.TokenIds(ids=[5] * n))),
    "conversation.messages": (MAX_COUNTS["conversation.messages"], conversation),
    "conversation.messages.tool_calls": (MAX_COUNTS["conversation.messages.tool_calls"], called),
    "conversation.tools": (
        MAX_COUNTS["conversation.tools"],
        lambda n: with_tools(tools=[pb.Tool(name=f"f{i}") for i in range(n)]),
    ),
    "conversation.allowed_tools": (
        MAX_COUNTS["conversation.allowed_tools"],
        lambda n: with_tools(tools=[pb.Tool(name="f")], allowed_tools=["f"] * n),
    ),
    "resume_token_ids": (CONTEXT - 1, lambda n: resumed(n)),
    "resume_outputs": (MAX_COUNTS["resume_outputs"], lambda n: resumed_outputs([[5]] * n)),
    "decoding.allowed_token_ids": (VOCAB, lambda n: decoding(allowed_token_ids=[i % VOCAB for i in range(n)])),
    "decoding.choice.options": (
        MAX_COUNTS["decoding.choice.options"],
        lambda n: decoding(choice=pb.Choice(options=["a"] * n)),
    ),
    "decoding.logit_bias": (
        MAX_COUNTS["decoding.logit_bias"],
        lambda n: decoding(logit_bias=dict.fromkeys(range(n), 1)),
    ),
    "stopping.stop_strings": (MAX_COUNTS["stopping.stop_strings"], lambda n: stopping(stop_strings=["zzz"] * n)),
    "stopping.stop_token_ids": (MAX_COUNTS["stopping.stop_token_ids"], lambda n: stopping(stop_token_ids=[9] * n)),
}
"""For each list and map: the largest count, and a request with a given count."""
SIZED = {
    "request_id": lambda n: request(request_id="r" * n),
    "resume_fingerprint": lambda n: request(resume_fingerprint="f" * n),
    "cache.salt": lambda n: request(cache=pb.CacheOptions(salt="s" * n)),
    "decoding.regex": lambda n: decoding(regex="a" * n),
    "decoding.lark_grammar": lambda n: decoding(lark_grammar=f'start: "{"a" * (n - 9)}"'),
    "decoding.json_schema": lambda n: decoding(json_schema=f'{{"const": "{"a" * (n - 13)}"}}'),
    "decoding.choice.options": lambda n: decoding(choice=pb.Choice(options=["a" * (n // 2), "b" * (n - n // 2)])),
    "stopping.stop_strings": lambda n: stopping(stop_strings=["z" * n]),
    "conversation.chat_template_kwargs": lambda n: with_tools(chat_template_kwargs=f'{{"a": "{"a" * (n - 9)}"}}'),
    "conversation.tools": lambda n: with_tools(tools=[pb.Tool(name="f", description="d" * (n - 7))]),
    "conversation.messages.tool_calls": lambda n: called(1, n - 7),
    "conversation.messages.tool_call_id": lambda n: called(1, id="i" * n),
}
"""For each text: a request with a given size in bytes."""


async def violations(stub: Any, message: pb.GenerateRequest) -> set[str]:
    """Returns the fields of which an error complains; none if the request succeeds."""
    try:
        await stub.Generate(message)
    except grpc.aio.AioRpcError as error:
        return {violation.field for violation in bad_request(error).field_violations}
    return set()


def bad_request(error: grpc.aio.AioRpcError) -> error_details_pb2.BadRequest:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    status = from_call(error)  # type: ignore[arg-type]
    assert status is not None, error.details()
    found = error_details_pb2.BadRequest()
    assert any(detail.Unpack(found) for detail in status.details)
    return found


@pytest.mark.parametrize("field", sorted(MAX_COUNTS.keys() | COUNTED.keys()))
async def test_the_largest_count_is_accepted_and_one_more_refused(service: Any, field: str) -> None:
    most, make = COUNTED[field]
    assert field not in await violations(service.stub, make(most))
    assert await violations(service.stub, make(most + 1)) & {field, "decoding.choice.options"}


PLACES = {
    "conversation.messages[1].tool_calls[0].id": "conversation.messages.tool_call_id",
    "decoding.choice.options[0]": "decoding.choice.options",
    "stopping.stop_strings[0]": "stopping.stop_strings",
}
"""The limits that apply to items of fields, by the place of an item."""


@pytest.mark.parametrize("field", sorted(MAX_BYTES.keys() - {"model"}))
async def test_the_largest_size_is_accepted_and_one_more_refused(service: Any, field: str) -> None:
    make, most = SIZED[field], MAX_BYTES[field]
    # A long constraint may cost too much, and no server has such a fingerprint, which is said in other words.
    for size, is_too_long in ((most, False), (most + 1, True)):
        try:
            await service.stub.Generate(make(size))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                assert not is_too_long
                continue
            described = {PLACES.get(v.field, v.field): v.description for v in bad_request(error).field_violations}
            assert described.keys() == {field}
            assert ("bytes" in described[field]) == is_too_long
        else:
            assert not is_too_long


@pytest.mark.parametrize("field", RANGES)
async def test_the_bounds_of_each_range_are_accepted_and_what_is_beyond_refused(make_service: Any, field: str) -> None:
    service, numbers = await make_service(max_waiting_requests=16), RANGES[field]

    def with_value(value: float) -> pb.GenerateRequest:
        message = request()
        part: Any = message
        *parents, name = field.split(".")
        for parent in parents:
            part = getattr(part, parent)
        if name == "logit_bias":
            part.logit_bias[5] = value
            return message
        if name == "max_whitespace":
            part.json_object.SetInParent()
        if name == "top_logprobs":
            part.return_logprobs = True
        is_float = part.DESCRIPTOR.fields_by_name[name].cpp_type == part.DESCRIPTOR.fields_by_name[name].CPPTYPE_FLOAT
        setattr(part, name, value if is_float else int(value))
        return message

    step = 1 if isinstance(numbers.high, int) and numbers.high > 10 else 0.001
    unsigned = "num_sequences", "max_whitespace", "top_logprobs", "chunk_tokens"
    is_unsigned = field.rpartition(".")[2] in unsigned or "repetition_guard" in field
    low = numbers.low + (0.01 if numbers.excludes_low else 0)
    accepted, refused = [low, numbers.high], [numbers.high + max(step, 1 if is_unsigned else step)]
    if numbers.excludes_low or not (is_unsigned and numbers.low == 0):
        refused.append(numbers.low if numbers.excludes_low else numbers.low - (1 if is_unsigned else step))
    for value in accepted:
        assert await violations(service.stub, with_value(value)) == set(), value
    for value in refused:
        found = {name.partition("[")[0] for name in await violations(service.stub, with_value(value))}
        assert found == {field}, value


async def test_resumed_tokens_are_counted_over_all_outputs(service: Any) -> None:
    half = [5] * (MAX_TOKEN_IDS // 2)
    too_long = {"resume_outputs[0].token_ids", "resume_outputs[1].token_ids"}
    assert await violations(service.stub, resumed_outputs([half, [*half, 5]])) == {
        *too_long,
        "resume_outputs.token_ids",
    }
    assert await violations(service.stub, resumed_outputs([half, half])) == too_long


async def test_a_message_larger_than_any_legal_request_is_refused_before_it_is_parsed(service: Any) -> None:
    info = await service.stub.GetServerInfo(pb.GetServerInfoRequest())
    most = info.limits.max_message_bytes
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.stub.Generate(pb.GenerateRequest(text="a" * most))
    assert "bytes; at most" in bad_request(refused.value).field_violations[0].description
    assert dict(info.limits.max_counts) == dict(MAX_COUNTS)
    assert dict(info.limits.max_bytes) == dict(MAX_BYTES)


MANY_FIELDS = {
    "conversation.messages": request(conversation=pb.Conversation(messages=[pb.Message()] * 300_000)),
    "conversation.tools": with_tools(tools=[pb.Tool()] * 300_000),
    "decoding.choice.options": decoding(choice=pb.Choice(options=[""] * 300_000)),
    "decoding.logit_bias": decoding(logit_bias=dict.fromkeys(range(30_000), 1)),
    "stopping.stop_strings": stopping(stop_strings=[""] * 300_000),
    "token_ids.ids": request(token_ids=pb.TokenIds(ids=[5] * 1_500_000)),
    "resume_token_ids": request(resume_token_ids=[5] * 1_500_000),
    "resume_outputs.token_ids": request(resume_outputs=[pb.PartialOutput(token_ids=[5] * 1_500_000)]),
    "decoding.allowed_token_ids": decoding(allowed_token_ids=[5] * 1_500_000),
    "priority": bytes([pb.GenerateRequest.DESCRIPTOR.fields_by_name["priority"].number << 3, 1]) * 300_000,
    "request": b"\xa8\x1f\x01" * 300_000,  # a field that the server does not know
}
"""A message with too many fields or numbers to be parsed in milliseconds, by the field of which it has them."""
MAX_ITEMS = {
    "token_ids.ids": MAX_TOKEN_IDS,
    "resume_token_ids": CONTEXT - 1,
    "resume_outputs.token_ids": MAX_TOKEN_IDS,
    "decoding.allowed_token_ids": VOCAB,
    "priority": 15_000,
    "request": 15_000,
}


@pytest.mark.parametrize("field", MANY_FIELDS)
async def test_messages_with_too_many_items_are_refused_before_they_are_parsed(service: Any, field: str) -> None:
    message = MANY_FIELDS[field]
    send = service.channel.unary_unary("/mpt.v1.TextGenerationService/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await send(message if isinstance(message, bytes) else message.SerializeToString())
    (violation,) = bad_request(refused.value).field_violations
    assert violation.field == field
    assert violation.description == f"too many items; at most {({**MAX_COUNTS, **MAX_ITEMS})[field]} are allowed"


@pytest.mark.parametrize("data", [b"\x08" + b"\x80" * 200_000, b"\x0a\xff\xff\xff\x0f" * 50_000])
async def test_large_messages_that_are_not_valid_are_refused(service: Any, data: bytes) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.channel.unary_unary("/mpt.v1.TextGenerationService/Generate")(data)
    assert bad_request(refused.value).field_violations[0].field == "request"


async def test_the_largest_legal_message_is_served(service: Any) -> None:
    message = decoding(
        choice=pb.Choice(options=[f"{number:015}" for number in range(MAX_COUNTS["decoding.choice.options"])]),
        logit_bias=dict.fromkeys(range(MAX_COUNTS["decoding.logit_bias"]), 0),
    )
    turns = [pb.Message(role=pb.ROLE_USER, content="x")] * MAX_COUNTS["conversation.messages"]
    turns.append(pb.Message(role=pb.ROLE_USER, content="x" * 200_000))
    message.conversation.MergeFrom(pb.Conversation(messages=turns[1:], drop_oldest_turns=True))
    assert message.ByteSize() > 256 << 10
    # Not of its counts, but of its length.
    assert await violations(service.stub, message) == {"conversation.messages[1023]"}


@pytest.mark.parametrize(
    "message",
    [
        request(model="m" * 8000),
        request(model="日" * 8000),
        stopping(stop_strings=["", *["日" * 300] * 15]),
        decoding(logit_bias={VOCAB + i: 1000 for i in range(1000)}),
        request(conversation=pb.Conversation(messages=[pb.Message(content="x")] * 1000)),
        decoding(json_schema='{"type": "' + "日" * 20_000 + '"}'),
    ],
    ids=["model", "long model", "stop_strings", "logit_bias", "roles", "schema"],
)
async def test_errors_of_any_length_arrive(service: Any, message: pb.GenerateRequest) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.stub.Generate(message)
    assert refused.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    size = sum(len(key) + len(value) for key, value in refused.value.trailing_metadata() or ())
    assert size < 6000


async def test_violations_that_do_not_fit_are_counted(service: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.stub.Generate(decoding(logit_bias={VOCAB + i: 0 for i in range(1000)}))
    found = bad_request(refused.value).field_violations
    assert found[-1].description == f"and {1000 - len(found) + 1} more"


async def test_a_violation_with_a_reason_is_kept_where_not_all_fit(service: Any) -> None:
    too_long = decoding(logit_bias={VOCAB + i: 0 for i in range(1000)})
    too_long.text = "word " * 3000
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.stub.Generate(too_long)
    found = bad_request(refused.value).field_violations
    assert [violation.field for violation in found if violation.reason == "CONTEXT_LENGTH_EXCEEDED"] == ["text"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (request(token_ids=pb.TokenIds(ids=[5] * (CONTEXT + 1))), "CONTEXT_LENGTH_EXCEEDED"),
        (request(token_ids=pb.TokenIds(ids=[5] * (MAX_TOKEN_IDS + 1)), truncate_prompt_tokens=1), ""),
        (resumed(CONTEXT), "CONTEXT_LENGTH_EXCEEDED"),
        (resumed_outputs([[5] * CONTEXT]), "CONTEXT_LENGTH_EXCEEDED"),
        (stopping(stop_token_ids=[9] * 2000), ""),
    ],
    ids=["prompt", "truncated prompt", "resumed output", "one of several", "stop tokens"],
)
async def test_lists_that_exceed_the_context_have_its_reason(
    service: Any, message: pb.GenerateRequest, reason: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.stub.Generate(message)
    (violation,) = bad_request(refused.value).field_violations
    assert (" items; at most " in violation.description, violation.reason) == (True, reason)


@pytest.mark.parametrize(
    "limit", [Duration(seconds=1, nanos=-5), Duration(seconds=(1 << 63) - 1), Duration(nanos=1_000_000_000)]
)
async def test_invalid_durations_are_refused(service: Any, limit: Duration) -> None:
    assert await violations(service.stub, stopping(time_limit=limit)) == {"stopping.time_limit"}


OTHER_METHODS = {
    "/grpc.health.v1.Health/Check": "unary_unary",
    "/grpc.health.v1.Health/Watch": "unary_stream",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "stream_stream",
    "/mpt.v1.TextGenerationService/GetModelInfo": "unary_unary",
    "/mpt.v1alpha1.DebugService/GetEngineState": "unary_unary",
}
"""Methods whose messages are short, and their kinds."""


@pytest.mark.parametrize("data", [b"\x0a\x90\xbf\x05" + b"x" * 90_000, b"\xff\xff"], ids=["too long", "not a message"])
@pytest.mark.parametrize("method", OTHER_METHODS)
async def test_messages_of_every_method_are_bounded_and_checked(service: Any, method: str, data: bytes) -> None:
    kind = OTHER_METHODS[method]
    call = getattr(service.channel, kind)(method)(iter([data]) if kind == "stream_stream" else data, timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await (call if kind == "unary_unary" else call.read())
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "request: " in str(raised.value.details())
