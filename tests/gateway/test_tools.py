"""Tools over HTTP, and messages as clients send them back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from http_calls import call, stream

PATH = "/v1/chat/completions"
ASK = {"role": "user", "content": "Is it sunny in Rome?"}
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "get_time", "strict": True}},
]
WEATHER = {"type": "function", "function": {"name": "get_weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


def body(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": messages or [ASK], "tools": TOOLS, "seed": 1, "max_tokens": 400, **fields}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "get_time"}),
        (WEATHER, {"get_weather"}),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}}, {"get_weather"}),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_calls_come_as_openai_sends_them(choice: Any, names: set[str], n: int, server: Any) -> None:
    request = body(tool_choice=choice, parallel_tool_calls=False, n=n)
    response = call(server, PATH, request)
    streamed: list[dict[str, Any]] = [{} for _ in range(n)]
    finishes = {}
    for chunk in stream(server, PATH, request):
        (choice_,) = chunk["choices"]
        assert not choice_["delta"].get("content")
        for part in choice_["delta"].get("tool_calls", ()):
            begun = streamed[choice_["index"]]
            assert part["index"] == 0
            assert ("id" in part) == ("type" in part) == ("name" in part["function"]) == (not begun)
            begun.setdefault("name", part["function"].get("name"))
            begun["arguments"] = begun.get("arguments", "") + part["function"]["arguments"]
        finishes[choice_["index"]] = choice_["finish_reason"]
    for complete, same in zip(response["choices"], streamed, strict=True):
        assert complete["finish_reason"] == finishes[complete["index"]] == "tool_calls"
        assert complete["message"]["content"] is None
        (made,) = complete["message"]["tool_calls"]
        assert made["type"] == "function"
        assert made["function"] == same
        assert same["name"] in names
        arguments = json.loads(same["arguments"])
        assert arguments == {} if same["name"] == "get_time" else arguments["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_text_comes_as_without_tools(choice: Any, server: Any) -> None:
    (complete,) = call(server, PATH, body(tool_choice=choice, max_tokens=5))["choices"]
    assert complete["message"]["content"]
    assert "tool_calls" not in complete["message"]
    assert complete["finish_reason"] == "length"


def test_none_is_the_same_as_no_tools(server: Any) -> None:
    none, without = body(tool_choice="none", max_tokens=5), body(tools=None, max_tokens=5)
    num_tokens = [call(server, PATH, each)["usage"]["prompt_tokens"] for each in (none, without)]
    assert num_tokens[0] == num_tokens[1]


def test_a_response_that_is_cut_short_says_so(server: Any) -> None:
    (complete,) = call(server, PATH, body(tool_choice="required", max_tokens=2))["choices"]
    assert complete["finish_reason"] == "length"
    assert complete["message"]["content"] == ""


def test_a_schema_for_the_text_may_be_combined_with_tools(server: Any) -> None:
    schema = {"name": "answer", "schema": {"type": "object", "properties": {"sunny": {"type": "boolean"}}}}
    form = {"type": "json_schema", "json_schema": schema}
    (complete,) = call(server, PATH, body(ASK, response_format=form, temperature=0))["choices"]
    message = complete["message"]
    assert message.get("tool_calls") or isinstance(json.loads(message["content"]), dict)


ASSISTANT = {
    "role": "assistant",
    "content": None,
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": [{**CALL, "index": 0}],
}


@pytest.mark.parametrize(
    "messages",
    [
        [ASK, ASSISTANT, RESULT],
        [ASK, {**ASSISTANT, "content": ""}, {**RESULT, "name": "get_weather"}],
        [ASK, {**ASSISTANT, "content": "Let me see."}, {**RESULT, "content": [{"type": "text", "text": "sunny"}]}],
        [ASK, {**ASSISTANT, "tool_calls": [CALL, {**CALL, "id": "2"}]}, RESULT, {**RESULT, "tool_call_id": "2"}, ASK],
        [ASK, {"role": "assistant", "content": "Yes.", "tool_calls": [], "id": "msg_1", "parsed": None}, ASK],
        [
            ASK,
            {
                "role": "assistant",
                "content": "Yes.",
                "tool_calls": None,
                "reasoning_content": "Hm.",
                "name": None,
                "images": None,
            },
            ASK,
        ],
        [ASK, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, ASK],
        [ASK, {"role": "assistant", "content": None}, ASK],
        [{**ASK, "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}],
        [{"role": "developer", "content": "Be short."}, ASK],
    ],
)
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_messages_are_taken_back_as_clients_dump_them(messages: list[Any], tools: Any, server: Any) -> None:
    request = body(*messages, tools=tools, max_tokens=1, stream_options={"include_usage": None})
    assert call(server, PATH, request)["choices"][0]["finish_reason"] == "length"


def test_the_message_of_a_response_is_taken_back(server: Any) -> None:
    message = call(server, PATH, body(tool_choice="required"))["choices"][0]["message"]
    results = [{**RESULT, "tool_call_id": made["id"]} for made in message["tool_calls"]]
    reply = call(server, PATH, body(ASK, message, *results, max_tokens=3))
    assert reply["usage"]["completion_tokens"] == 3
