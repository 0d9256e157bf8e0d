"""How tools, calls and results are shown to the model."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt_grpc.conversation import Conversation, Message, Tool, ToolCall, ToolChoice
from mpt_grpc.errors import InvalidRequestError
from mpt_grpc.text.chat import conversation_token_ids
from mpt_grpc.text.literals import SpecialTexts
from mpt_grpc.text.template_sources import find_chat_template

HERMES = """{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
{% endif %}{% for message in messages %}[{{ message.role }}]{{ message.content }}
{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{% endfor %}{% if message.role == 'tool' %}({{ message.name }} {{ message.tool_call_id }})
{% endif %}{% endfor %}"""
OTHER = "{{ tools or '' }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}'
WEATHER = Tool("get_weather", "The weather of a city.", SCHEMA)
TIME = Tool("get_time", "", "")
ASK = Message("user", "Is it sunny in Rome?")
CALL = Message("assistant", "Let me see.", (ToolCall("call_1", "get_weather", '{"city":"Rome"}'),))
RESULT = Message("tool", "sunny", tool_call_id="call_1")
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"]


def prompt(
    *messages: Message, template: str = "base", tools: tuple[Tool, ...] = (WEATHER,), special: str = "", **fields: Any
) -> str:
    """Returns the prompt as text, in which special tokens are written as their texts."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(map(ord, text.replace(special, "\U000f0000") if special else text))

    conversation = Conversation(messages, tools=tools, **fields)
    chat_template = find_chat_template(template, Path("none"), "demo")
    ids = conversation_token_ids(
        conversation,
        chat_template,
        encode,
        lambda token_id: chr(token_id).encode(),
        10_000,
        None,
        special_texts=SpecialTexts([special] if special else []),
    )
    return "".join(map(chr, ids))


def test_a_template_without_tools_gets_them_as_text() -> None:
    text = prompt(Message("system", "Be short."), ASK, CALL, RESULT, tools=(WEATHER, TIME))
    introduction, _, rest = text.partition("---\n")
    assert introduction.startswith("Be short.\n\nThe assistant can call these tools:\n")
    first, second = (json.loads(line) for line in introduction.splitlines() if line.startswith('{"name": "get_'))
    assert first == {"name": WEATHER.name, "description": WEATHER.description, "parameters": json.loads(SCHEMA)}
    assert second["parameters"] == {"type": "object", "properties": {}, "additionalProperties": False}
    assert rest == (
        "User: Is it sunny in Rome?\n"
        'Assistant: Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        "User: <tool_response>\nsunny\n</tool_response>\n"
        "Assistant:"
    )


def test_results_and_the_question_after_them_are_one_message_of_the_user() -> None:
    thanks = Message("user", "Thanks!")
    text = prompt(ASK, CALL, RESULT, RESULT, thanks, Message("assistant", "Bye."), thanks, template="chatml")
    assert text.count("<|im_start|>user") == 3
    response = "<tool_response>\nsunny\n</tool_response>"
    assert f"<|im_start|>user\n{response}\n{response}\nThanks!<|im_end|>" in text


def test_a_template_that_takes_tools_gets_what_transformers_passes() -> None:
    text = prompt(ASK, CALL, RESULT, template=HERMES)
    function = {"name": WEATHER.name, "description": WEATHER.description, "parameters": json.loads(SCHEMA)}
    assert text == (
        f"<tools>{json.dumps({'type': 'function', 'function': function})}</tools>\n"
        "[user]Is it sunny in Rome?\n"
        '[assistant]Let me see.\n<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>\n'
        "[tool]sunny\n(get_weather call_1)\n"
    )


def test_a_template_with_another_format_of_calls_gets_tools_as_text() -> None:
    assert prompt(ASK, template=OTHER).startswith("[system]The assistant can call these tools:")


def test_without_a_choice_of_tools_nothing_is_shown() -> None:
    assert prompt(ASK, tool_choice=ToolChoice.NONE) == prompt(ASK, tools=())


@pytest.mark.parametrize("template", ["base", HERMES])
def test_what_users_and_tools_write_contains_no_tags(template: str) -> None:
    forged = "".join(TAGS)
    call = ToolCall("1", "get_weather", json.dumps({"city": forged, forged: [forged]}))
    messages = (Message("user", forged), Message("assistant", "", (call,)), Message("tool", forged, tool_call_id="1"))
    honest = (
        Message("user", ""),
        Message("assistant", "", (ToolCall("1", "get_weather", "{}"),)),
        Message("tool", "", tool_call_id="1"),
    )
    text = prompt(*messages, template=template)
    for tag in TAGS:
        assert text.count(tag) == prompt(*honest, template=template).count(tag), tag
        assert tag.replace("<", "&lt;") in text


@given(text=st.text(alphabet="<>/_tolcarespn|x" + string.whitespace, max_size=60), where=st.integers(0, 3))
def test_no_text_of_callers_becomes_a_special_token(text: str, where: int) -> None:
    texts = ["", "", "", ""]
    texts[where] = f"{text}<|x|>{text}"
    call = ToolCall("1", "get_weather", json.dumps({"city": texts[1], f"a{texts[2]}": 1}))
    messages = (
        Message("user", texts[0]), Message("assistant", "", (call,)), Message("tool", texts[3], tool_call_id="1")
    )  # fmt: skip
    for template in ("base", HERMES):
        assert "\U000f0000" not in prompt(*messages, template=template, special="<|x|>")


def test_arguments_that_were_cut_short_are_shown_as_text() -> None:
    cut = Message("assistant", "", (ToolCall("1", "get_weather", '{"city": "Ro'),))
    assert '"arguments": "{\\"city\\": \\"Ro"' in prompt(ASK, cut, RESULT)


@pytest.mark.parametrize("template", ["base", HERMES])
@pytest.mark.parametrize("arguments", [r'{"city": "\ud800"}', r'{"\ud800": 1}'])
def test_arguments_that_are_not_valid_unicode_are_shown_as_text(template: str, arguments: str) -> None:
    call = Message("assistant", "", (ToolCall("1", "get_weather", arguments),))
    assert json.dumps(arguments) in prompt(ASK, call, RESULT, template=template)


def test_dropped_turns_take_their_calls_and_results_along() -> None:
    whole = prompt(ASK, CALL, RESULT, Message("assistant", "Yes."), ASK)
    fields: dict[str, Any] = {"drop_oldest_turns": True}
    conversation = Conversation((ASK, CALL, RESULT, Message("assistant", "Yes."), ASK), tools=(WEATHER,), **fields)
    template = find_chat_template("base", Path("none"), "demo")
    ids = conversation_token_ids(
        conversation, template, lambda t: tuple(map(ord, t)), lambda i: chr(i).encode(), len(whole) - 1, None
    )
    assert "".join(map(chr, ids)) == prompt(ASK)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": (Tool("get weather", "", ""),)}, "tools[0].name"),
        ({"tools": (Tool("", "", ""),)}, "tools[0].name"),
        ({"tools": (Tool("x" * 65, "", ""),)}, "tools[0].name"),
        ({"tools": (TIME, WEATHER, TIME)}, "tools[2].name"),
        ({"tools": (Tool("f", "", "{"),)}, "tools[0].parameters"),
        ({"tools": (Tool("f", "", "[" * 5000),)}, "tools[0].parameters"),
        ({"tools": (Tool("f", "", r'{"description": "\ud800"}'),)}, "tools[0].parameters"),
        ({"tools": (Tool("f", "", r'{"properties": {"\ud800": {}}}'),)}, "tools[0].parameters"),
        ({"tools": (Tool("f", "", '{"a": ' * 70 + "1" + "}" * 70),)}, "tools[0].parameters"),
        ({"tools": (Tool("f", "", '{"type": "string"}'),)}, "tools[0].parameters"),
        ({"tools": (Tool("f", "", "[]"),)}, "tools[0].parameters"),
        ({"tools": (TIME,), "allowed_tools": ("get_time", "other")}, "allowed_tools[1]"),
        ({"tools": (), "tool_choice": ToolChoice.REQUIRED}, "tool_choice"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs[tools]"),
    ],
)
def test_tools_that_are_not_valid_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        prompt(ASK, **fields)
    assert [violation.field for violation in refused.value.violations] == [f"conversation.{named}"]


def test_the_longest_name_of_a_tool_is_accepted() -> None:
    assert "x" * 64 in prompt(ASK, tools=(Tool("x" * 64, "", ""),))


def test_calls_and_results_in_the_wrong_place_are_refused_by_name() -> None:
    call = ToolCall("1", "<tool_call>", "{}")
    messages = (
        Message("user", "", (CALL.tool_calls[0],)),
        Message("assistant", "", (call,)),
        Message("user", "", (), "1"),
    )
    with pytest.raises(InvalidRequestError) as refused:
        prompt(*messages, tools=())
    fields = ("[0].tool_calls", "[1].tool_calls[0].name", "[2].tool_call_id")
    assert [violation.field for violation in refused.value.violations] == [f"conversation.messages{f}" for f in fields]


def test_what_is_certainly_too_long_is_refused_as_it_was_written() -> None:
    """Its tags would be longer without their meaning."""
    conversation = Conversation((Message("user", "<tools>" * 1000),), tools=(WEATHER,))
    template = find_chat_template("base", Path("none"), "demo")
    with pytest.raises(InvalidRequestError, match="7000 characters are too many for the context of 100 tokens"):
        conversation_token_ids(
            conversation, template, lambda _: (), lambda i: chr(i).encode(), 100, None, max_token_bytes=8
        )


def test_arguments_count_as_they_are_shown() -> None:
    spaced = Message("assistant", "", (ToolCall("call_1", "get_weather", '{"city":' + " " * 9000 + '"Rome"}'),))
    conversation = Conversation((ASK, spaced, RESULT), tools=())
    template = find_chat_template("base", Path("none"), "demo")
    ids = conversation_token_ids(
        conversation, template, lambda t: tuple(map(ord, t)), lambda i: chr(i).encode(), 500, None, max_token_bytes=1
    )
    assert '"arguments": {"city": "Rome"}' in "".join(map(chr, ids))
