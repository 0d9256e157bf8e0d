"""Responses over HTTP: their items, their events, and what is refused."""

from __future__ import annotations

import asyncio
import json
import urllib.error
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SteppedRunner, demo_settings
from http_calls import call, fetch, response_events, send

from mpt_grpc.gateway import events
from mpt_grpc.gateway.model_response import ModelResponse
from mpt_grpc.gateway.response_request import ResponseRequest
from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings
from mpt_grpc_client import Delta, Finish, FinishReason, ToolCallDelta, Usage

PATH = "/v1/responses"
ASK = {"role": "user", "content": "Is it sunny in Rome?"}
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "get_weather", "description": "The weather.", "parameters": SCHEMA}
TIME = {"type": "function", "name": "get_time", "strict": True}
CALL = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": '{"city": "Rome"}'}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
ENDS = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


def body(*items: Any, **fields: Any) -> dict[str, Any]:
    return {"input": items or [ASK], "seed": 1, "max_output_tokens": 9, **fields}


def without_ids(response: Any) -> Any:
    items = [{**item, "id": None, "call_id": None} for item in response["output"]]
    return {**response, "id": None, "created_at": None, "output": items, "usage": response["usage"]["output_tokens"]}


def types(events: list[Any]) -> list[str]:
    """Returns the types of events, repeated ones only once."""
    names = [event["type"] for event in events]
    return [name for name, before in zip(names, [None, *names], strict=False) if name != before]


def error(server: Any, request: dict[str, Any]) -> Any:
    with pytest.raises(urllib.error.HTTPError) as raised:
        call(server, PATH, request)
    return json.load(raised.value)["error"]


@pytest.mark.parametrize("include", [[], ["message.output_text.logprobs", "reasoning.encrypted_content"]])
def test_the_events_of_a_text_add_up_to_the_response(include: list[str], server: Any) -> None:
    request = body(include=include, metadata={"order": "17"}, instructions="Be brief.")
    complete, streamed = call(server, PATH, request), response_events(server, request)
    assert types(streamed) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        *ENDS,
        "response.incomplete",
    ]
    assert [event["sequence_number"] for event in streamed] == list(range(len(streamed)))
    created, (text_done, _, item_done, last) = streamed[0]["response"], streamed[-4:]
    assert (created["status"], created["output"], created["metadata"]) == ("in_progress", [], {"order": "17"})
    assert without_ids(last["response"]) == without_ids(complete)
    deltas = [event for event in streamed if event["type"] == "response.output_text.delta"]
    (item,) = last["response"]["output"]
    assert item_done["item"] == {**item, "content": [{**item["content"][0], "logprobs": []}]}
    assert {event["item_id"] for event in deltas} == {item["id"]}
    assert "".join(event["delta"] for event in deltas) == text_done["text"] == item["content"][0]["text"]
    assert [logprob for event in deltas for logprob in event["logprobs"]] == item["content"][0]["logprobs"]
    assert len(item["content"][0]["logprobs"]) == (9 if include else 0)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "name": "get_weather"}, {"get_weather"}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]},
            {"get_time"},
        ),
    ],
)
def test_the_events_of_a_call_add_up_to_the_response(choice: Any, names: set[str], server: Any) -> None:
    fields = {"tools": [WEATHER, TIME], "tool_choice": choice, "parallel_tool_calls": False}
    request = body(max_output_tokens=400, **fields)
    complete, streamed = call(server, PATH, request), response_events(server, request)
    assert types(streamed[2:]) == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    last = streamed[-1]["response"]
    assert without_ids(last) == without_ids(complete)
    assert (last["tool_choice"], last["parallel_tool_calls"]) == (choice, False)
    (item,) = last["output"]
    assert item["name"] in names
    assert streamed[2]["item"] == {**item, "arguments": "", "status": "in_progress"}
    pieces = [event["delta"] for event in streamed if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(pieces) == streamed[-3]["arguments"] == item["arguments"]
    arguments = json.loads(item["arguments"])
    assert arguments == {} if item["name"] == "get_time" else arguments["city"] in ("Paris", "Rome")


async def test_an_item_ends_before_the_next_begins() -> None:
    """The demo model does not call tools on its own, so its output is given here."""
    parts = [("fc_a", "f", ""), ("", "", "{}"), ("fc_b", "g", "{}")]
    deltas = [
        Delta(0, "Hm.", 1, (), (), None),
        *(Delta(0, "", 1, (), (), None, (ToolCallDelta(0, *part),)) for part in parts),
    ]
    finish = Finish(FinishReason.TOOL_CALLS)

    @asynccontextmanager
    async def stream() -> AsyncIterator[Any]:
        async def all_deltas(*, keep_logprobs: bool) -> AsyncIterator[Delta]:  # noqa: ARG001
            for delta in deltas:
                yield delta

        yield SimpleNamespace(deltas=all_deltas, result=SimpleNamespace(finish=finish, usage=Usage(1, 0, 4, 0)))

    response = ModelResponse("demo", "1", ResponseRequest(input="Hi"))
    streamed = [event async for event in response.chunks(stream)]  # type: ignore[arg-type]
    of_items = [(event["output_index"], event["type"]) for event in streamed if "output_index" in event]
    assert [index for index, _ in of_items] == sorted(index for index, _ in of_items)
    for index in range(3):
        names = [name for of, name in of_items if of == index]
        assert (names[0], names[-1]) == ("response.output_item.added", "response.output_item.done")
    output = streamed[-1]["response"]["output"]
    assert [(item["type"], item["status"]) for item in output] == [
        ("message", "completed"), ("function_call", "completed"), ("function_call", "completed")
    ]  # fmt: skip
    assert [item["call_id"] for item in output[1:]] == ["fc_a", "fc_b"]
    assert len({item["id"] for item in output}) == 3


def test_a_response_that_is_cut_short_says_so(server: Any) -> None:
    cut = call(server, PATH, body(tools=[TIME], tool_choice="required", max_output_tokens=2))
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (cut["status"], cut["output"][-1]["status"]) == ("incomplete", "incomplete")


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ({"type": "json_object"}, dict),
        ({"type": "json_schema", "name": "legs", "schema": {"enum": [2, 4]}, "strict": True}, int),
    ],
)
def test_a_text_has_the_requested_format(form: Any, kind: type, server: Any) -> None:
    response = call(server, PATH, body(text={"format": form}, max_output_tokens=300, temperature=0))
    assert response["text"]["format"] == form
    assert response["status"] == "incomplete" or isinstance(
        json.loads(response["output"][0]["content"][0]["text"]), kind
    )


ASSISTANT = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hm."}]}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
USER = {"role": "user", "content": "Hm."}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("Hm.", [USER]),
        ([{**USER, "content": [{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "m."}]}], [USER]),
        (
            [
                ASK,
                {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
                {**ASSISTANT, "id": "msg_1", "status": "completed", "phase": "commentary"},
                {**CALL, "id": "fc_1", "status": "completed", "parsed_arguments": None},
                {**CALL, "call_id": "call_2"},
                {**OUTPUT, "id": None, "status": None},
                {**OUTPUT, "call_id": "call_2", "output": [{"type": "input_text", "text": "sunny"}]},
                {"role": "developer", "content": "Be brief."},
                USER,
            ],
            [
                ASK,
                {"role": "assistant", "content": "Hm.", "tool_calls": [CALLED, {**CALLED, "id": "call_2"}]},
                RESULT,
                {**RESULT, "tool_call_id": "call_2"},
                {"role": "developer", "content": "Be brief."},
                USER,
            ],
        ),
        ([ASK, CALL, OUTPUT, CALL, OUTPUT], [ASK, *[{"role": "assistant", "tool_calls": [CALLED]}, RESULT] * 2]),
    ],
)
def test_items_are_the_messages_of_a_chat_completion(items: Any, messages: Any, server: Any) -> None:
    request = {"seed": 1, "temperature": 1}
    response = call(server, PATH, {**request, "input": items, "max_output_tokens": 9})
    completion = call(server, "/v1/chat/completions", {**request, "messages": messages, "max_tokens": 9})
    assert response["output"][0]["content"][0]["text"] == completion["choices"][0]["message"]["content"]
    assert response["usage"]["input_tokens"] == completion["usage"]["prompt_tokens"]


def test_the_oldest_items_are_dropped_with_truncation(server: Any) -> None:
    items = [ASK, {"role": "assistant", "content": "word " * 3000}, ASK]
    assert error(server, body(*items))["param"] == "input[1]"
    assert call(server, PATH, body(*items, truncation="auto"))["usage"]["input_tokens"] < 150


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": []}, "input: must be text, or a list of items"),
        ({"input": ""}, "input: must be text, or a list of items"),
        ({"input": 3}, "input: must be text, or a list of items"),
        ({"input": [ASK] * 1025}, "input: 1025 items; at most 1024 are allowed"),
        ({"input": [ASK, {"type": "item_reference", "id": "msg_1"}]}, "input[1]: an item_reference is not supported"),
        (
            {"input": [ASK, {"type": "computer_call"}]},
            "input[1]: the type 'computer_call' is not supported; must be an",
        ),
        ({"input": [ASK, {**ASK, "id": 5}]}, "input[1].id: must be a string"),
        ({"input": [ASK, {"role": "robot", "content": "3"}]}, "input[1].role: must be system, developer, user or"),
        (
            {"input": [ASK, {**ASK, "content": [{"type": "input_image"}]}]},
            "input[1].content[0]: the type 'input_image' is not supported; must be a part of type input_text",
        ),
        ({"input": [{**ASK, "content": [{"type": "input_text", "text": ""}] * 1025}]}, "input[0].content: 1025 items"),
        ({"input": [ASK, {**ASK, "contents": []}]}, "input[1]: unknown field 'contents'; did you mean 'content'?"),
        ({"input": [ASK, {"type": "function_call", "call_id": "1"}]}, "input[1].name: must be text, the name of"),
        ({"input": [ASK, {**OUTPUT, "output": 3}]}, "input[1].output: must be text, or a list of parts"),
        ({"input": [ASK, ASSISTANT, CALL, {**CALL, "name": "a b"}, OUTPUT]}, "input[3].name: must have 1 to 64"),
        ({"input": [ASK, {**CALL, "call_id": "c" * 257}, OUTPUT]}, "input[1].call_id: 257 bytes; at most 256 are"),
        ({"input": [ASK, CALL, {**OUTPUT, "call_id": "c" * 257}]}, "input[2].call_id: 257 bytes; at most 256 are"),
        ({"input": [ASK, ASSISTANT], "instructions": "Hm."}, "input[1].role: the last message must have the role"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type: must be function; the server has no tools of its own"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name: must have 1 to 64 letters"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice: no function in tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice: must be none, auto, required"),
        ({"tool_choice": "required"}, "tool_choice: no tool to call; set tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema: required if type is json"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type: "),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "text.format.schema: /type: "),
        (
            {"text": {"format": {"type": "json_object"}}, "guided_regex": "a"},
            "more than one constraint: text.format, g",
        ),
        ({"max_output_tokens": 5000}, "max_output_tokens: 5000 new tokens leave no room"),
        ({"input": [{"type": "reasoning"}]}, "input: has no message"),
        ({"max_tokens": 5}, "unknown field 'max_tokens'"),
        ({"top_logprobs": 2}, "top_logprobs: requires 'message.output_text.logprobs' in include; add it"),
        ({"include": ["everything"]}, "include[0]: "),
        ({"metadata": {"a": "b" * 513}}, "metadata: must map at most 16 names, "),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata: "),
        ({"background": True}, "background: must be false, since responses are not stored"),
        ({"previous_response_id": "resp_1"}, "previous_response_id: not supported, since responses are not stored"),
        ({"conversation": "conv_1"}, "conversation: not supported, since conversations are not stored"),
        ({"truncation": "always"}, "truncation: "),
        ({"temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'?"),
        ({"reasonin": {}}, "unknown field 'reasonin'; did you mean 'reasoning'?"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_name_the_fields_as_they_were_sent(
    fields: dict[str, Any], message: str, stream: bool, server: Any
) -> None:
    refusal = error(server, {"input": [ASK], "stream": stream, **fields})
    assert refusal["message"].startswith(message)
    if not message.startswith("more") and "unknown" not in message:
        assert refusal["message"].startswith(f"{refusal['param']}: ")


@pytest.fixture
async def stepped_server(stepped: list[SteppedRunner]) -> AsyncIterator[RunningServer]:
    async with running_server(replace(demo_settings(), http=HttpSettings(port=0))) as server:
        yield server
        stepped[0].run_free()


async def test_an_idle_stream_is_kept_alive_and_a_failure_is_its_last_event(
    stepped: list[SteppedRunner], stepped_server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "KEEPALIVE_S", 0.05)
    reader, writer = await send(stepped_server, "POST", PATH, body(stream=True, ignore_eos=True))
    streamed: list[Any] = []

    async def read_until(*ends: str) -> None:
        async for line in reader:
            if line.startswith(b"data: {"):
                streamed.append(json.loads(line[6:]))
                if types(streamed)[-len(ends) :] == list(ends):
                    return

    def fail(_: Any) -> Any:
        raise RuntimeError("a kernel has failed")

    async with asyncio.timeout(60):
        for _ in range(3):
            stepped[0].allow()
        await read_until("response.output_text.delta", "response.in_progress")
        monkeypatch.setattr(stepped[0], "run", fail)
        stepped[0].allow()
        await read_until("response.failed")
        assert b"data:" not in await reader.read()
    writer.close()
    assert [event["sequence_number"] for event in streamed] == list(range(len(streamed)))
    failed = streamed[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert failed["output"][0]["status"] == "incomplete"
    assert failed["output"][0]["content"][0]["text"]


async def test_responses_are_not_stored(stepped: list[SteppedRunner], stepped_server: RunningServer) -> None:
    stepped[0].run_free()
    status, created = await fetch(stepped_server, "POST", PATH, body(store=True))
    assert (status, created["store"]) == (200, False)
    status, refusal = await fetch(stepped_server, "GET", f"{PATH}/{created['id']}")
    assert (status, refusal["error"]["message"][:28]) == (404, "responses are not stored; se")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/r"), ("DELETE", "/r"), ("GET", "/r/input_items"), ("POST", "/r/cancel")]
)
async def test_what_is_below_a_response_says_that_it_is_not_stored(
    stepped_server: RunningServer, method: str, path: str
) -> None:
    status, refusal = await fetch(stepped_server, method, f"{PATH}{path}")
    assert (status, refusal["error"]["message"][:28]) == (404, "responses are not stored; se")


@pytest.mark.parametrize("path", ["/input_tokens", "/compact"])
async def test_other_uses_of_input_are_refused_with_a_remedy(stepped_server: RunningServer, path: str) -> None:
    status, refusal = await fetch(stepped_server, "POST", f"{PATH}{path}", body())
    assert (status, refusal["error"]["message"][:24]) == (404, "not supported; /tokenize")
