"""Calls of tools over gRPC, on a real server."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import demo_settings

from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    pb.Tool(name="get_weather", description="The weather.", parameters=json.dumps(CITY)),
    pb.Tool(name="get_time", description="The time."),
]
ASK = pb.Message(role=pb.ROLE_USER, content="Is it sunny in Rome?")


def request(
    *messages: pb.Message, seed: int = 1, max_new_tokens: int = 400, stopping: Any = None, **fields: Any
) -> pb.GenerateRequest:
    """Returns a request that may call `TOOLS`; fields are those of the conversation."""
    of_request = {name: fields.pop(name) for name in fields.keys() & set(pb.GenerateRequest.DESCRIPTOR.fields_by_name)}
    return pb.GenerateRequest(
        conversation=pb.Conversation(messages=messages or [ASK], **{"tools": TOOLS, **fields}),
        sampling=pb.SamplingParameters(seed=seed),
        stopping=stopping or pb.StoppingCriteria(max_new_tokens=max_new_tokens),
        output_options=pb.OutputOptions(return_token_ids=True),
        **of_request,
    )


def joined(parts: Iterable[pb.ToolCall]) -> list[tuple[str, str, str]]:
    calls: dict[int, tuple[str, str, str]] = {}
    for part in parts:
        call_id, name, arguments = calls.get(part.index, (part.id, part.name, ""))
        calls[part.index] = call_id, name, arguments + part.arguments
    return list(calls.values())


@pytest.mark.parametrize("seed", range(3))
async def test_required_calls_are_complete_and_a_stream_has_the_same(service: Any, seed: int) -> None:
    message = request(seed=seed, tool_choice=pb.TOOL_CHOICE_REQUIRED, request_id=f"calls-{seed}")
    (output,) = (await service.stub.Generate(message)).outputs
    assert output.finish.reason == pb.FINISH_REASON_TOOL_CALLS
    assert output.text == ""
    assert 1 <= len(output.tool_calls) <= 16
    for call in output.tool_calls:
        arguments = json.loads(call.arguments)
        assert arguments == {} if call.name == "get_time" else arguments["city"] in ("Paris", "Rome", "Oslo")
    chunks = [chunk.output async for chunk in service.stub.StreamGenerate(message)]
    parts = [part for chunk in chunks for part in chunk.tool_calls]
    assert joined(parts) == [(call.id, call.name, call.arguments) for call in output.tool_calls]
    assert all(bool(part.id) == bool(part.name) for part in parts)
    assert [i for chunk in chunks for i in chunk.token_ids] == list(output.token_ids)
    assert chunks[-1].finish == output.finish


async def test_one_tool_can_be_forced_and_calls_limited_to_one(service: Any) -> None:
    for name in ("get_weather", "get_time"):
        message = request(tool_choice=pb.TOOL_CHOICE_REQUIRED, allowed_tools=[name], parallel_tool_calls=False)
        (output,) = (await service.stub.Generate(message)).outputs
        assert [call.name for call in output.tool_calls] == [name]
        assert output.finish.reason == pb.FINISH_REASON_TOOL_CALLS


async def test_without_a_need_for_tools_the_output_is_text(service: Any) -> None:
    (free,) = (await service.stub.Generate(request(max_new_tokens=12))).outputs
    assert free.text
    assert not free.tool_calls
    none = request(max_new_tokens=12, tool_choice=pb.TOOL_CHOICE_NONE)
    plain = request(max_new_tokens=12, tools=[])
    assert (await service.stub.Generate(none)).outputs[0].text == (await service.stub.Generate(plain)).outputs[0].text


async def test_the_model_decides_between_calls_and_text_that_a_constraint_applies_to(service: Any) -> None:
    choice = pb.DecodingOptions(choice=pb.Choice(options=["\nSunny", "\nRainy"]))
    found = set()
    for seed in range(8):
        (output,) = (await service.stub.Generate(request(seed=seed, decoding=choice))).outputs
        assert (output.finish.reason == pb.FINISH_REASON_TOOL_CALLS) == bool(output.tool_calls)
        found.add(output.text or "call")
    assert {"call"} < found <= {"\nSunny", "\nRainy", "call"}


async def test_results_of_calls_continue_the_conversation(service: Any) -> None:
    forced = request(tool_choice=pb.TOOL_CHOICE_REQUIRED, parallel_tool_calls=False)
    (output,) = (await service.stub.Generate(forced)).outputs
    called = pb.Message(role=pb.ROLE_ASSISTANT, content=output.text, tool_calls=output.tool_calls)
    result = pb.Message(role=pb.ROLE_TOOL, content="sunny", tool_call_id=output.tool_calls[0].id)
    reply = await service.stub.Generate(request(ASK, called, result, max_new_tokens=8))
    assert reply.outputs[0].num_tokens == 8
    without_tools = await service.stub.Generate(request(ASK, called, result, max_new_tokens=8, tools=[]))
    assert without_tools.prompt.num_tokens < reply.prompt.num_tokens


async def test_an_output_cut_short_is_not_one_of_complete_calls(service: Any) -> None:
    whole = (await service.stub.Generate(request(tool_choice=pb.TOOL_CHOICE_REQUIRED))).outputs[0]
    (cut,) = (await service.stub.Generate(request(max_new_tokens=3, tool_choice=pb.TOOL_CHOICE_REQUIRED))).outputs
    assert cut.finish.reason == pb.FINISH_REASON_MAX_NEW_TOKENS
    assert cut.text == ""
    assert not cut.tool_calls
    stopping = pb.StoppingCriteria(max_new_tokens=400, stop_strings=[whole.tool_calls[0].name])
    message = request(tool_choice=pb.TOOL_CHOICE_REQUIRED, stopping=stopping)
    (stopped,) = (await service.stub.Generate(message)).outputs
    assert stopped.finish.reason == pb.FINISH_REASON_STOP_STRING
    assert not stopped.tool_calls


async def test_calls_are_resumed_wherever_they_were_interrupted(service: Any) -> None:
    message = request(seed=2, tool_choice=pb.TOOL_CHOICE_REQUIRED, request_id="resumed")
    chunks = [chunk.output async for chunk in service.stub.StreamGenerate(message)]
    expected = joined(part for chunk in chunks for part in chunk.tool_calls)
    for received in range(1, len(chunks), 1 + len(chunks) // 8):
        sent = [i for chunk in chunks[:received] for i in chunk.token_ids]
        message.resume_token_ids[:] = sent
        rest = [chunk.output async for chunk in service.stub.StreamGenerate(message)]
        assert joined(p for c in (*chunks[:received], *rest) for p in c.tool_calls) == expected
        assert rest[-1].finish.reason == pb.FINISH_REASON_TOOL_CALLS


async def test_outputs_have_calls_of_their_own(service: Any) -> None:
    message = request(tool_choice=pb.TOOL_CHOICE_REQUIRED)
    message.sampling.num_sequences = 3
    outputs = (await service.stub.Generate(message)).outputs
    ids = [call.id for output in outputs for call in output.tool_calls]
    assert len(set(ids)) == len(ids) >= 3


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"stopping": pb.StoppingCriteria(ignore_eos=True)}, "stopping.ignore_eos"),
        ({"decoding": pb.DecodingOptions(allowed_token_ids=[5])}, "decoding.allowed_token_ids"),
        ({"tools": [pb.Tool(name="f", parameters='{"not": {"const": 1}}')]}, "conversation.tools[0].parameters"),
        ({"tools": [pb.Tool(name="a b")]}, "conversation.tools[0].name"),
        ({"tool_choice": 9}, "conversation.tool_choice"),
        ({"allowed_tools": ["other"]}, "conversation.allowed_tools[0]"),
    ],
)
async def test_invalid_tools_are_refused_by_name(service: Any, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await service.stub.Generate(request(**fields))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in str(refused.value.trailing_metadata())


HERMES = """{% if tools %}<tools>{{ tools | map(attribute='function.name') | join(' ') }}</tools>
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>
{% endfor %}{% endfor %}assistant:"""


async def test_a_template_that_takes_tools_is_used_as_it_is(make_service: Any) -> None:
    settings = demo_settings()
    service = await make_service(replace(settings, model=replace(settings.model, chat_template=HERMES)))
    message = request(tool_choice=pb.TOOL_CHOICE_REQUIRED, parallel_tool_calls=False)
    (output,) = (await service.stub.Generate(message)).outputs
    assert output.finish.reason == pb.FINISH_REASON_TOOL_CALLS
    called = pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=output.tool_calls)
    result = pb.Message(role=pb.ROLE_TOOL, content="<tool_call>", tool_call_id=output.tool_calls[0].id)
    message = request(ASK, called, result, max_new_tokens=1)
    message.output_options.return_prompt_token_ids = True
    token_ids = (await service.stub.Generate(message)).prompt.token_ids
    function = {"name": output.tool_calls[0].name, "arguments": json.loads(output.tool_calls[0].arguments)}
    assert (await service.stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids))).text == (
        f"<tools>get_weather get_time</tools>\nuser: {ASK.content}\n"
        f"assistant: \n<tool_call>\n{json.dumps(function)}\n</tool_call>\ntool: &lt;tool_call>\nassistant:"
    )


async def test_a_guard_checks_calls_as_it_checks_text(make_service: Any, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text('/"city" ?: ?"Rome/\n')
    service = await make_service(replace(demo_settings(), guards=(f"words={words}",)))
    ask = pb.Message(role=pb.ROLE_USER, content="Is it sunny?")
    found = set()
    for seed in range(8):
        message = request(ask, seed=seed, tool_choice=pb.TOOL_CHOICE_REQUIRED, allowed_tools=["get_weather"])
        message.conversation.parallel_tool_calls = False
        (output,) = (await service.stub.Generate(message)).outputs
        (call,) = output.tool_calls
        found.add((output.finish.reason, call.arguments.rstrip() == "{"))
        assert "Rome" not in call.arguments
    assert found == {(pb.FINISH_REASON_TOOL_CALLS, False), (pb.FINISH_REASON_CONTENT_FILTER, True)}


async def test_a_text_that_is_the_beginning_of_a_call_is_returned(service: Any) -> None:
    (end,) = (await service.stub.GetModelInfo(pb.GetModelInfoRequest())).eos_token_ids
    first = (await service.stub.Tokenize(pb.TokenizeRequest(text="<tool_call>"))).tokens[0].token_id
    choice = pb.Choice(options=["<tool_call>"])
    message = request(decoding=pb.DecodingOptions(choice=choice, logit_bias={first: 100, end: 100}))
    (output,) = (await service.stub.Generate(message)).outputs
    assert (output.text, len(output.tool_calls)) == ("<tool_call>", 0)
    assert output.finish.reason == pb.FINISH_REASON_EOS_TOKEN
