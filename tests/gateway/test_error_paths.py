"""The path in an error leads to a value in the body that was sent, or to one that is missing there."""

from __future__ import annotations

import copy
import http.client
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NAMED = {"type": "function", "name": "f"}
MISNAMED = {"name": "a b", "arguments": "{}"}
COMMON = {
    "model": "m", "temperature": 1.0, "top_p": 0.9, "seed": 1, "stop": "zz", "frequency_penalty": 0.1,
    "logit_bias": {"5": 1.0}, "stream_options": {"include_usage": True}, "top_k": 5, "min_tokens": 1,
    "stop_token_ids": [3], "ignore_eos": False, "cache_salt": "s", "chunk_interval": 0.1, "priority": 1,
}  # fmt: skip
MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "n"},
    {"role": "assistant", "content": "x", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "r"},
    {"role": "user", "content": "b"},
]
ALLOWED = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "r"}]},
]
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "tools of a chat": (
        "/chat/completions",
        {
            "messages": MESSAGES,
            "max_completion_tokens": 1,
            "logprobs": True,
            "top_logprobs": 1,
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": ALLOWED},
        },
    ),
    "schema of a chat": (
        "/chat/completions",
        {
            "messages": MESSAGES[:1],
            "max_tokens": 1,
            "max_whitespace": 1,
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        },
    ),
    "text": ("/completions", {**COMMON, "prompt": ["a", "b"], "max_tokens": 2, "logprobs": 1, "n": 1}),
    "tokens": ("/completions", {"prompt": [[5, 6], [7]], "max_tokens": 1, "guided_choice": ["a"], "echo": True}),
    "structured text": ("/completions", {"prompt": [5], "max_tokens": 1, "structured_outputs": {"json": SCHEMA}}),
    "tools of a response": (
        "/responses",
        {
            "input": ITEMS,
            "instructions": "i",
            "max_output_tokens": 1,
            "tools": [{"type": "function", **FUNCTION}],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [NAMED]},
            "include": ["message.output_text.logprobs"],
            "metadata": {"a": "b"},
        },
    ),
    "schema of a response": (
        "/responses",
        {"input": "a", "max_output_tokens": 1, "text": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    ),
}
MISSING = object()
WRONG = (MISSING, 5, -1, "", [], {}, {"no_field": 1}, [{}], "a" * 70_000)
PATH = re.compile(r"(?:^|; )([a-z_]+(?:\.\w+|\[\w+\])*): ")
PYDANTIC = re.compile(r"(?i)input should|field required|instance of|valid (string|list|dict|integer|number|boolean)")


@pytest.mark.parametrize("name", BODIES)
def test_an_error_names_what_was_sent(name: str, server: Any) -> None:
    path, body = BODIES[name]
    connection = http.client.HTTPConnection(urlsplit(server.openai_url).netloc, timeout=60)
    num_errors = 0
    assert respond(connection, path, body) is None
    for place in places(body):
        for value in WRONG:
            sent = changed(body, place, value)
            if (error := respond(connection, path, sent)) is not None:
                num_errors += 1
                assert ": " in error["message"]
                for where in PATH.findall(error["message"]):
                    assert leads_somewhere(where, sent), (place, value, error)
                assert leads_somewhere(error["param"], sent), (place, value, error)
                assert not PYDANTIC.search(error["message"]), error
    connection.close()
    assert num_errors > 30


@pytest.mark.parametrize(
    ("path", "body", "start"),
    [
        ("/completions", {"prompt": ["a", [1]]}, "prompt: must be text, a list of token IDs"),
        ("/completions", {"prompt": "a", "max_whitespace": 1}, "max_whitespace: requires a JSON Schema"),
        ("/completions", {"prompt": ["a", "b " * 3000]}, "prompt[1]: 3001 tokens leave no room"),
        ("/completions", {"prompt": [[1], [2, 999_999]]}, "prompt[1][1]: 999999 is not a token ID"),
        ("/completions", {"prompt": [2, 999_999], "echo": True, "stream": True}, "prompt[1]: 999999 is not a token ID"),
        ("/completions", {"prompt": "a", "stop": ""}, "stop: its length, 0 bytes, "),
        ("/completions", {"prompt": "a", "stop": ["a", ""]}, "stop[1]: its length, 0 bytes, "),
        (
            "/chat/completions",
            {"messages": [{**MESSAGES[1], "tool_calls": [CALL, {**CALL, "function": MISNAMED}]}, MESSAGES[3]]},
            "messages[0].tool_calls[1].function.name: must have 1 to 64",
        ),
        (
            "/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]: the type 'input_image' is not supported; must be a part of type input_text",
        ),
        (
            "/responses",
            {"input": [{"type": "computer_call"}]},
            "input[0]: the type 'computer_call' is not supported; must be an item of type message, function_call,",
        ),
        ("/responses", {"input": "a", "max_tokens": 1}, "unknown field 'max_tokens'; did you mean 'max_output_tokens'"),
        ("/responses", {"input": "a", "messages": []}, "unknown field 'messages'; did you mean 'input'?"),
        ("/responses", {"messages": MESSAGES}, "unknown field 'messages'; did you mean 'input'?"),
        ("/responses", {"prompt": "a"}, "prompt: not supported, since prompts are not stored"),
        ("/responses", {"temprature": 1}, "input: must be text, or a list of items"),
        ("/chat/completions", {"input": "a"}, "unknown field 'input'; did you mean 'messages'?"),
        ("/chat/completions", {"temprature": 1, "prompt": "a"}, "unknown field 'prompt'; did you mean 'messages'?"),
        ("/chat/completions", {"temprature": 1}, "messages: must be a list of at least one message"),
        ("/chat/completions", {"messages": MESSAGES, "system": ""}, "unknown field 'system'; did you mean 'messages'?"),
        ("/responses", {"input": "a", "system": "a"}, "unknown field 'system'; did you mean 'instructions'?"),
        ("/responses", {"input": "a", "stop_sequences": ["a"]}, "unknown field 'stop_sequences'; did you mean 'stop'?"),
        ("/completions", {"messages": MESSAGES}, "unknown field 'messages'; did you mean 'prompt'?"),
        ("/completions", {"input": "a"}, "unknown field 'input'; did you mean 'prompt'?"),
        (
            "/responses",
            {"input": [ITEMS[0], {**ITEMS[1], "name": "a b"}, ITEMS[2]]},
            "input[1].name: must have 1 to 64",
        ),
        (
            "/chat/completions",
            {"messages": [{**MESSAGES[3], "prefix": True}]},
            "messages[0].prefix: only a last message with the role 'assistant'",
        ),
        (
            "/chat/completions",
            {"messages": [MESSAGES[3], {"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[1].content[0].text: must be a string",
        ),
        ("/responses", {"input": "a", "metadata": {"k" * 99_999: "v"}}, "metadata: must map at most 16 names"),
        (
            "/responses",
            {"input": "a", "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [NAMED] * 129}},
            "tool_choice.tools: 129 items; at most 128 are allowed",
        ),
    ],
)  # fmt: skip
def test_a_path_is_exact(path: str, body: dict[str, Any], start: str, server: Any) -> None:
    connection = http.client.HTTPConnection(urlsplit(server.openai_url).netloc, timeout=60)
    error = respond(connection, path, body)
    connection.close()
    assert error is not None
    assert error["message"].startswith(start)
    assert error["message"].startswith((f"{error['param']}: ", f"unknown field {error['param']!r}"))


def respond(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> Any:
    """Returns the error that the response to a body is, or None."""
    connection.request("POST", f"/v1{path}", json.dumps(body))
    with connection.getresponse() as response:
        assert response.status in (200, 400)
        return json.load(response).get("error")


def places(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yields the keys and indexes that lead to each value inside of a body."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*place, key)
        yield from places(child, (*place, key))


def changed(body: dict[str, Any], place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """Returns a body with another value at a place, or with none."""
    result: Any = copy.deepcopy(body)
    parent = result
    for key in place[:-1]:
        parent = parent[key]
    if value is MISSING:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    changed_body: dict[str, Any] = result
    return changed_body


def leads_somewhere(path: str, body: Any) -> bool:
    """Whether a path leads to a value of a body, or into an object that lacks what the path ends with."""
    keys = re.findall(r"[^.\[\]]+", path)
    for key in keys[:-1]:
        try:
            body = body[int(key)] if isinstance(body, list) else body[key]
        except (LookupError, ValueError, TypeError):
            return False
    return isinstance(body, dict) or (isinstance(body, list) and keys[-1].isdecimal() and int(keys[-1]) < len(body))
