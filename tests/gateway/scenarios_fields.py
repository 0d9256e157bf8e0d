"""Each field of the requests of OpenAI's SDK is handled as docs/openai.md says.

Run by `test_sdks.py` like `scenarios.py`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
from openai.types import completion_create_params as text_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import FunctionToolParam, ResponseFunctionToolCallParam, response_create_params
from openai_sdk import raised, sdk

QUESTION = "Is it sunny in Rome?"
ROWS = re.findall(
    r"^\| `(\w+)` \| ([\w, ]+) \| (\w+) \|",
    (Path(__file__).parents[2] / "docs/openai.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "parameters": PARAMETERS, "strict": True}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}

RESPONSE: dict[str, Any] = {
    "access_programs": {"cyber": "standard"},
    "background": False,
    "background_options": {"completion_window": "soonest"},
    "context_management": [{"type": "compaction"}],
    "conversation": "conv_1",
    "image": {"context_compression": "auto"},
    "include": ["reasoning.encrypted_content"],
    "input": QUESTION,
    "instructions": "Be brief.",
    "max_output_tokens": 1,
    "max_tool_calls": 3,
    "metadata": {"order": "17"},
    "model": "demo",
    "moderation": {"model": "omni-moderation-latest"},
    "parallel_tool_calls": False,
    "previous_response_id": "resp_1",
    "prompt": {"id": "pmpt_1"},
    "prompt_cache_key": "key",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "reasoning": {"effort": "low", "summary": "auto"},
    "safety_identifier": "me",
    "service_tier": "auto",
    "store": True,
    "stream": False,
    "stream_options": {"include_obfuscation": False},
    "temperature": 0.5,
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "tool_choice": "auto",
    "tools": [{"type": "function", **WEATHER}],
    "top_logprobs": 0,
    "top_p": 0.9,
    "truncation": "auto",
    "user": "me",
}

BOTH: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1},
    "max_tokens": 1,
    "model": "demo",
    "n": 1,
    "presence_penalty": 0.5,
    "seed": 1,
    "stop": ["a"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_p": 0.9,
    "user": "me",
}
TEXT: dict[str, Any] = {**BOTH, "best_of": 1, "echo": True, "logprobs": 1, "prompt": "The fox", "suffix": "."}
CHAT: dict[str, Any] = {
    **BOTH,
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": "none",
    "functions": [WEATHER],
    "logprobs": True,
    "max_completion_tokens": 1,
    "messages": [{"role": "user", "content": QUESTION}],
    "metadata": {"order": "17"},
    "modalities": ["text"],
    "moderation": {"model": "omni-moderation-latest"},
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "Yes."},
    "prompt_cache_key": "key",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "text"},
    "safety_identifier": "me",
    "service_tier": "auto",
    "store": True,
    "tool_choice": "auto",
    "tools": [{"type": "function", "function": WEATHER}],
    "top_logprobs": 0,
    "verbosity": "low",
    "web_search_options": {},
}


def every_field_of_a_response(url: str) -> None:
    annotations = response_create_params.ResponseCreateParamsBase.__annotations__
    required = {"model": "demo", "input": QUESTION, "max_output_tokens": 1}
    walk("responses", annotations, RESPONSE, required, sdk(url).responses.create)


def every_field_of_a_chat(url: str) -> None:
    annotations = chat_params.CompletionCreateParamsBase.__annotations__
    walk(
        "chat",
        annotations,
        CHAT,
        {"messages": CHAT["messages"], "model": "demo", "max_tokens": 1},
        sdk(url).chat.completions.create,
    )


def every_field_of_a_text(url: str) -> None:
    annotations = text_params.CompletionCreateParamsBase.__annotations__
    walk(
        "text", annotations, TEXT, {"prompt": "The fox", "model": "demo", "max_tokens": 1}, sdk(url).completions.create
    )


def walk(
    endpoint: str, annotations: Any, values: dict[str, Any], required: dict[str, Any], create: Callable[..., Any]
) -> None:
    assert {*annotations, "stream"} == set(values)
    names = {"responses": ("all", "responses"), "chat": ("all", "both", "chat"), "text": ("all", "both", "text")}[
        endpoint
    ]
    support = {name: level for name, group, level in ROWS if set(group.split(", ")) & set(names)}
    assert not set(values) - set(support), "the page lists every field"
    for name, value in values.items():
        call = lambda name=name, value=value: create(**{**required, name: value})  # noqa: E731
        if support[name] == "refused":
            error = raised(openai.BadRequestError, call)
            assert error.param == name
            assert "unknown" not in str(error)
        else:
            assert call().usage.total_tokens > 0, name


def every_field_of_messages_calls_and_tools(url: str) -> None:
    """Those of assistants that are not null in OpenAI's responses only are refused: `audio` and `function_call`."""
    part = {"type": "text", "text": QUESTION, "prompt_cache_breakpoint": {"mode": "explicit"}}
    user = {"role": "user", "content": [part], "name": "me"}
    assistant = {"role": "assistant", "audio": None, "content": None, "function_call": None, "name": "it"}
    assistant |= {"refusal": None, "tool_calls": [CALL]}
    for value, kind in (
        (part, ChatCompletionContentPartTextParam),
        (user, ChatCompletionUserMessageParam),
        (assistant, ChatCompletionAssistantMessageParam),
    ):
        assert set(value) == set(kind.__annotations__)
    result = {"role": "tool", "tool_call_id": "call_1", "content": [part]}
    messages: Any = [user, assistant, result]
    assert sdk(url).chat.completions.create(model="demo", messages=messages, max_tokens=1).choices
    tool = {**WEATHER, "type": "function", "async": False, "description": "Tell the weather."}
    tool |= {"allowed_callers": ["direct"], "defer_loading": False, "output_schema": {"type": "string"}}
    call = {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": "{}", "id": "fc_1"}
    call |= {"status": "completed", "async": False, "caller": {"type": "direct"}, "namespace": "n"}
    for value, kind in ((tool, FunctionToolParam), (call, ResponseFunctionToolCallParam)):
        assert set(value) >= set(kind.__annotations__)
    output = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    items: Any = [{"role": "user", "content": QUESTION}, call, output]
    tools: Any = [tool]
    assert sdk(url).responses.create(model="demo", input=items, tools=tools, max_output_tokens=1).output is not None


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        globals()[name](*sys.argv[2:])
        print("passed", name)
