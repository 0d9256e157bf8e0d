"""The gateway's errors name the fields of the HTTP request."""

from __future__ import annotations

import json
import urllib.error
from typing import Any

import pytest
from http_calls import call

from mpt_grpc.gateway.errors import error_response
from mpt_grpc_client import OverloadedError

USER = {"role": "user", "content": "Hi"}
BAD_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}
EMPTY = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}
IMPOSSIBLE = {"type": "json_schema", "json_schema": {"name": "x", "schema": EMPTY}}
IMPOSSIBLE_ARGUMENTS = {"type": "function", "function": {"name": "g", "parameters": EMPTY}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NAMED = {"type": "function", "function": {"name": "g"}}
FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "messages"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["1"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [999_999]}, "tokens[0]"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": ["a", 1]}, "prompt"),
        ("/v1/completions", {"prompt": [True]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "logprobs": True}, "logprobs"),
        ("/v1/completions", {"prompt": "\ud83d"}, "prompt"),
        ("/v1/completions", {"prompt": "a", "stop": ["\ud83d"]}, "stop"),
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud83d"}]}, "messages"),
        ("/v1/completions", {"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "top_k": 1 << 40}, "top_k"),
        *(
            ("/v1/completions", {"prompt": "a", "logit_bias": {key: 1}}, "logit_bias")
            for key in ("-1", "05", " 5", "5.0")
        ),
        ("/v1/completions", {"prompt": "a", "priority": 1 << 40}, "priority"),
        ("/v1/completions", {"prompt": "a", "priority": -101}, "priority"),
    ],
)
def test_bad_input_names_the_field(path: str, body: Any, param: str, server: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        call(server, path, body)
    assert raised.value.code == 400
    assert json.load(raised.value)["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: must be a list of at least one message"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "c" * 257}]}, USER]},
            "messages[1].tool_calls[1].id: 257 bytes; at most 256 are allowed",
        ),
        ({"messages": [USER], "priority": 101}, "priority: must be an integer from -100 to 100"),
        ({"messages": [USER], "temperature": 100.1}, "temperature: 100.1 is not in [0, 100]"),
        ({"messages": [USER, {"role": "robot", "content": "3"}]}, "messages[1].role: must be system, developer,"),
        (
            {"messages": [USER, {**USER, "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
            "messages[1].content[1]: the type 'image_url' is not supported; must be a part of type text",
        ),
        ({"messages": [{**USER, "content": [{"type": "text"}]}]}, "messages[0].content[0].text: required"),
        (
            {"messages": [{**USER, "content": [{"type": "text", "text": "a", "txt": "b"}]}]},
            "messages[0].content[0]: unknown field 'txt'; did you mean 'text'?",
        ),
        ({"messages": [{**USER, "content": 5}]}, "messages[0].content: must be text, or a list of parts"),
        (
            {"messages": [USER, {**USER, "tool_cals": []}]},
            "messages[1]: unknown field 'tool_cals'; did you mean 'tool_",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: must be text"),
        ({"messages": [{"role": "tool"}]}, "messages[0].content: must be text"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0].tool_calls: only messages with the role"),
        ({"messages": [{**USER, "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function: required"),
        ({"messages": [USER], "tool_choice": "required"}, "tool_choice: no tool to call; set tools"),
        ({"tools": [{**FUNCTION, "function": {"name": "a b"}}]}, "tools[0].function.name: must have 1 to 64"),
        ({"temperature": 100.1}, "temperature: 100.1 is not in [0, 100]"),
        ({"temperature": 1e300}, "temperature: 1e+300 is beyond the range of 32-bit numbers"),
        ({"top_p": 1.0000001}, "top_p: 1.0000001 is not in (0, 1]"),
        ({"logit_bias": {"5": -1e30}}, "logit_bias[5]: -1e+30 is not in [-100, 100]"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0]"),
        ({"tools": [FUNCTION], "tool_choice": NAMED}, "tool_choice: no function in tools is named 'g'"),
        ({"tools": [FUNCTION] * 129}, "tools: 129 items; at most 128 are allowed"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens: "),
        ({"min_tokens": 500}, "min_tokens: 500 is not in [0, 256], where the upper bound is the limit of new tokens"),
        ({"n": 2, "max_tokens": 0}, "n: must be 1 if the limit of new tokens is 0: there is no output"),
        ({"top_logprobs": 2}, "top_logprobs: requires logprobs"),
        ({"response_format": {"type": "yaml"}}, "response_format.type: "),
        ({"response_format": BAD_SCHEMA}, "response_format.json_schema.schema: /type: "),
        ({"response_format": IMPOSSIBLE}, "response_format.json_schema.schema: /properties/a: no output can"),
        ({"tools": [FUNCTION, IMPOSSIBLE_ARGUMENTS]}, "tools[1].function.parameters: /properties/a: no output can"),
        ({"guided_json": {"type": "x"}}, "guided_json: "),
        ({"guided_choice": []}, "guided_choice: empty"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex: unclosed group"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json: must be a JSON schema"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "more than one constraint: guided_regex, guided_choice"),
        ({"tools": [FUNCTION], "tool_choice": "maybe"}, "tool_choice: must be none, auto, required, a function"),
        ({"temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'?"),
        ({"max_output_tokens": 5}, "unknown field 'max_output_tokens'; did you mean 'max_completion_tokens'?"),
        ({"input": "a"}, "unknown field 'input'; did you mean 'messages'?"),
        ({"metdata": {}}, "unknown field 'metdata'; did you mean 'metadata'?"),
        (
            {"stream_options": {"include_usge": True}},
            "stream_options: unknown field 'include_usge'; did you mean 'include",
        ),
        ({"tools": [{**FUNCTION, "function": {"nam": "f"}}]}, "tools[0].function.name: required"),
        ({"seed": -1}, "seed: must be an integer from 0 to 2^64 - 1"),
        ({"seed": 1 << 64}, "seed: must be an integer from 0 to 2^64 - 1"),
        (
            {"chat_template": "{{ 1 }}"},
            "chat_template: not supported per request; set it on the server, with --chat-te",
        ),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: "),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs[messages]: 'messages' is set by the server"),
        ({"chat_template_kwargs": {"a": "b" * (16 << 10)}}, "chat_template_kwargs: 16"),
        ({"add_generation_prompt": "soon"}, "add_generation_prompt: "),
        ({"messages": [USER, {**USER, "role": "assistant"}]}, "messages[1].role: the last message must have the role"),
        ({"messages": ["Hi"]}, "messages[0]: must be an object with a role and content"),
        ({"messages": [USER, {**USER, "name": 5}]}, "messages[1].name: must be a string"),
        ({"messages": [{**USER, "prefx": True}]}, "messages[0]: unknown field 'prefx'; did you mean 'prefix'?"),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": ""}}, USER]},
            "messages[0].function_call: not supported; use tool_calls",
        ),
        ({"messages": [{**USER, "prefix": True}]}, "messages[0].prefix: only a last message with the role 'assis"),
    ],
)
def test_errors_name_the_fields_as_they_were_sent(fields: dict[str, Any], message: str, server: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        call(server, "/v1/chat/completions", {"messages": [USER], **fields})
    assert json.load(raised.value)["error"]["message"].startswith(message)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [USER]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
    ],
)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (True, "1")),
        *(("top_k", value) for value in (True, "1", 5.0)),
        *(("stop_token_ids", [value]) for value in (True, "1", 5.0)),
        *(("logit_bias", {"1": value}) for value in (True, "1")),
        *(("seed", value) for value in (True, "1", 5.0)),
        *(("ignore_eos", value) for value in (1, "true", 0.0)),
    ],
)
def test_no_value_is_taken_for_one_of_another_type(path: str, body: Any, field: str, value: Any, server: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        call(server, path, {**body, field: value})
    error = json.load(raised.value)["error"]
    assert (raised.value.code, error["type"]) == (400, "invalid_request_error")
    assert error["param"].startswith(field)
    assert error["message"].startswith(f"{error['param']}: ")


def test_an_integer_is_taken_where_a_number_is_expected(server: Any) -> None:
    fields = {"temperature": 0, "top_p": 1, "logit_bias": {"5": -1}, "max_tokens": 1}
    assert call(server, "/v1/completions", {"prompt": "a", **fields})["choices"]


def test_an_unknown_field_without_a_similar_one_gets_no_suggestion(server: Any) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        call(server, "/v1/completions", {"prompt": "a", "foo": 1})
    assert json.load(raised.value)["error"]["message"] == "unknown field 'foo'"


def test_the_largest_seed_is_accepted(server: Any) -> None:
    assert call(server, "/v1/completions", {"prompt": "a", "max_tokens": 1, "seed": (1 << 64) - 1})["choices"]


def test_the_chat_template_gets_its_fields(server: Any) -> None:
    fields = {"max_tokens": 1, "chat_template_kwargs": {"unused": {"a": [1, None]}}}
    whole, bare = (
        call(server, "/v1/chat/completions", {"messages": [USER], "add_generation_prompt": begins, **fields})
        for begins in (True, False)
    )
    assert whole["usage"]["prompt_tokens"] > bare["usage"]["prompt_tokens"]
    reply = {"role": "assistant", "content": "Yes."}
    assert call(server, "/v1/chat/completions", {"messages": [reply], "add_generation_prompt": False, **fields})


@pytest.mark.parametrize(
    ("path", "name", "last", "fields"),
    [
        ("/v1/chat/completions", "messages", {}, {"continue_final_message": True}),
        ("/v1/chat/completions", "messages", {}, {"continue_final_message": True, "add_generation_prompt": False}),
        ("/v1/chat/completions", "messages", {"prefix": True}, {}),
        ("/v1/responses", "input", {}, {"continue_final_message": True}),
    ],
)
def test_the_assistants_last_message_is_continued(
    path: str, name: str, last: dict[str, Any], fields: dict[str, Any], server: Any
) -> None:
    """The text is that of the prompt that the template makes, up to the end of the message."""
    messages = [USER, {"role": "assistant", "content": "The fox is"}]
    tokens = call(server, "/tokenize", {"messages": messages, "continue_final_message": True})["tokens"]
    assert call(server, "/detokenize", {"tokens": tokens})["prompt"].endswith("\nAssistant: The fox is")
    rest = {"max_tokens": 8, "temperature": 0, "stop": ["\nUser:"]}
    expected = call(server, "/v1/completions", {"prompt": tokens, **rest})["choices"][0]["text"]
    if path == "/v1/responses":
        rest["max_output_tokens"] = rest.pop("max_tokens")
    response = call(server, path, {name: [USER, {**messages[1], **last}], **fields, **rest})
    reply = response["choices"][0]["message"] if "choices" in response else response["output"][0]["content"][0]
    assert reply["text" if "output" in response else "content"] == expected


def test_what_other_servers_add_to_a_reply_is_ignored(server: Any) -> None:
    added = {"provider_specific_fields": None, "thinking_blocks": [], "images": [], "reasoning_details": [{"a": 1}]}
    messages = [USER, {"role": "assistant", "content": "Yes.", **added}, USER]
    assert call(server, "/v1/chat/completions", {"messages": messages, "max_tokens": 1})["choices"]


@pytest.mark.parametrize("kind", ["text", "message"])
def test_a_message_may_have_the_type_that_evaluations_and_responses_give_it(kind: str, server: Any) -> None:
    assert call(server, "/v1/chat/completions", {"messages": [{**USER, "type": kind}], "max_tokens": 1})["choices"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{**USER, "content": "word " * 3000}]}, "messages[0]"),
        ("/v1/chat/completions", {"messages": [{**USER, "content": "word " * 1000}] * 3}, "messages"),
        ("/v1/completions", {"prompt": "word " * 3000}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "word " * 1000], "max_tokens": 2000}, "max_tokens"),
        ("/v1/completions", {"prompt": "a" * (1 << 20)}, "prompt"),
        ("/v1/completions", {"prompt": [1] * 3000}, "prompt"),
        ("/v1/completions", {"prompt": [[1], [1] * 3000]}, "prompt[1]"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 5000}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [USER], "max_tokens": 5000}, "max_tokens"),
        ("/v1/chat/completions", {"messages": [USER], "max_tokens": 2040}, "max_tokens"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 5000}, "max_output_tokens"),
        ("/v1/responses", {"input": "word " * 3000}, "input"),
        ("/v1/responses", {"input": "a", "instructions": "word " * 3000}, "instructions"),
        ("/v1/responses", {"input": [USER, {**USER, "content": "word " * 3000}]}, "input[1]"),
        ("/tokenize", {"messages": [USER, {**USER, "content": "word " * 3000}]}, "messages[1]"),
    ],
)
def test_a_prompt_that_is_too_long_has_openais_code(path: str, body: Any, param: str, server: Any) -> None:
    """Agents that meet it shorten the conversation and try again."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        call(server, path, body)
    error = json.load(raised.value)["error"]
    assert (raised.value.code, error["code"], error["param"]) == (400, "context_length_exceeded", param)


def test_oldest_turns_are_dropped_on_request(server: Any) -> None:
    messages = [USER, {"role": "assistant", "content": "word " * 3000}, USER]
    response = call(server, "/v1/chat/completions", {"messages": messages, "max_tokens": 1, "drop_oldest_turns": True})
    assert response["usage"]["prompt_tokens"] < 100


def test_the_time_to_wait_is_rounded_up_to_whole_seconds() -> None:
    """A caller who comes earlier is refused again."""
    headers = error_response(OverloadedError("busy", retry_after=1.2)).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1200")
