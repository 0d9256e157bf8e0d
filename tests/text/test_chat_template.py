"""Chat templates: rendering as in transformers, and what templates refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mpt_grpc.conversation import Message, Tool, ToolCall
from mpt_grpc.errors import InvalidRequestError
from mpt_grpc.text.template_sources import find_chat_template

DOLLY = Path(__file__).parents[2].parent / "shared" / "data" / "traces" / "dolly_hhrlhf_train_small.jsonl"

SYSTEM = Message("system", "Be short.")
HI = Message("user", "Hi")
HELLO = Message("assistant", "Hello!")
WHO = Message("user", "Who are you?")

LLAMA_LIKE = """{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}
{%- else -%}
    {%- set system_message = '' -%}
{%- endif -%}
{{ bos_token }}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- if loop.first and system_message -%}
[INST] <<SYS>>
{{ system_message }}
<</SYS>>

{{ message['content'] | trim }} [/INST]
        {%- else -%}
[INST] {{ message['content'] | trim }} [/INST]
        {%- endif -%}
    {%- else -%}
 {{ message['content'] | trim }} {{ eos_token }}
    {%- endif -%}
{%- endfor -%}
"""
JSON_LIKE = """{% if tools is not none or documents %}TOOLS{% endif %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% if loop.index0 > 3 %}
        {% break %}
    {% endif %}
{{ {'who': message.role, 'said': message.content} | tojson }}
{{ [message.content] | tojson(indent=2) }}{{ [message.content] | tojson(true, 1, (';', '=')) }}{{ eos_token }}
    {% generation %}
{{ message.content }}
    {% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


WITH_KWARGS = """{{ bos_token }}{% if enable_thinking is defined and not enable_thinking %}<no_think>{% endif %}
{% for document in documents or [] %}[{{ document.title }}] {{ document.text }}
{% endfor %}
{{ tools | tojson if tools else 'no tools' }} {{ level | default(0) + 1 }} {{ style | tojson if style else '' }}
{% for message in messages %}
{{ message.content }}{{ eos_token }}
{% endfor %}
{{ 'begin' if add_generation_prompt else 'end' }}"""


def rendered(name: str, *messages: Message) -> str:
    return find_chat_template(name, Path("no such folder"), "demo").render(messages)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder that names two special tokens."""
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    return tmp_path


def test_base_template_renders_a_transcript() -> None:
    assert rendered("base", HI) == (
        "A conversation between a user and an assistant.\n"
        "The assistant gives short, true answers, and says so when it does not know.\n"
        "---\nUser: Hi\nAssistant:"
    )
    assert rendered("base", SYSTEM, HI, HELLO, WHO) == (
        "Be short.\n---\nUser: Hi\nAssistant: Hello!\nUser: Who are you?\nAssistant:"
    )


def test_instruct_template_renders_the_format_that_mpt_instruct_was_trained_on() -> None:
    intro = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    assert rendered("instruct", HI) == intro + "### Instruction:\nHi\n\n### Response:\n"
    assert rendered("instruct", SYSTEM, HI, HELLO, WHO) == (
        intro + "Be short.\n\n### Instruction:\nHi\n\n### Response:\nHello!\n\n"
        "### Instruction:\nWho are you?\n\n### Response:\n"
    )


def test_chatml_template_delimits_each_message() -> None:
    assert rendered("chatml", HI) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered("chatml", SYSTEM, HI, HELLO, WHO) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_instruct_template_reproduces_prompts_from_the_training_data() -> None:
    if not DOLLY.is_file():
        pytest.skip(f"the training data is not available: {DOLLY} does not exist")
    prompts = [json.loads(line)["prompt"] for line in DOLLY.read_text().splitlines()[:200]]
    instructions = [prompt.partition("### Instruction:\n")[2].removesuffix("\n\n### Response:\n") for prompt in prompts]
    template = find_chat_template("instruct", Path("none"), "demo")
    assert prompts
    assert [template.render([Message("user", text)]) for text in instructions] == prompts


@pytest.mark.parametrize("name", ["base", "instruct", "chatml"])
@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% raw %}", "{# note #}", "a\n\n", "  a", "<b>&amp;</b>", ""])
def test_message_content_is_not_interpreted_as_a_template(name: str, text: str) -> None:
    plain = rendered(name, Message("user", "QUESTION"))
    assert rendered(name, Message("user", text)) == plain.replace("QUESTION", text)


@pytest.mark.parametrize("source", [LLAMA_LIKE, JSON_LIKE, WITH_KWARGS])
@pytest.mark.parametrize(
    "messages", [(HI,), (SYSTEM, HI), (HI, HELLO, WHO), (SYSTEM, HI, HELLO, Message("user", "é <b>\n")), (HI, HELLO)]
)
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"enable_thinking": False, "level": 3, "style": {"tone": "dry", "rules": ["é", None, 0.5]}},
        {"documents": [{"title": "A", "text": "b"}], "tools": [{"name": "f"}], "enable_thinking": True},
        {"self": 1, "loop": 2, "range": 3, "": 4, "unused {{ name }}": 5},
    ],
)
def test_templates_are_rendered_as_by_transformers(
    folder: Path, source: str, messages: tuple[Message, ...], begins: bool, kwargs: dict[str, Any]
) -> None:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    variables = {name: value for name, value in kwargs.items() if name != "self"}  # transformers cannot pass it
    (expected,), _ = render_jinja_template(
        [turns], chat_template=source, add_generation_prompt=begins, bos_token="<s>", eos_token="</s>", **variables
    )
    assert find_chat_template(source, folder, "demo").render(messages, begins, kwargs) == expected


TRIMMING = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} [end]\n{% endfor %}"


@pytest.mark.parametrize("source", [LLAMA_LIKE, WITH_KWARGS, TRIMMING])
@pytest.mark.parametrize("text", ["I am", " I am ", "I am\n", ""])
def test_a_message_is_continued_as_by_transformers(source: str, text: str, folder: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
    (expected,), _ = render_jinja_template(
        [turns], chat_template=source, continue_final_message=True, bos_token="<s>", eos_token="</s>"
    )
    messages = (HI, Message("assistant", text))
    assert find_chat_template(source, folder, "demo").render(messages, continue_final_message=True) == expected


@pytest.mark.parametrize("name", ["base", "instruct", "chatml"])
def test_a_prompt_that_continues_a_message_ends_with_it(name: str) -> None:
    template = find_chat_template(name, Path("none"), "demo")
    messages = (HI, Message("assistant", "I am"))
    assert template.render(messages, continue_final_message=True).endswith(" I am" if name == "base" else "\nI am")


def test_a_template_that_does_not_show_the_last_message_cannot_continue_it(folder: Path) -> None:
    template = find_chat_template("{{ messages[0].content }}", folder, "demo")
    with pytest.raises(InvalidRequestError, match="it does not show the last message"):
        template.render((HI, HELLO), continue_final_message=True)


HERMES_LIKE = """{% if tools %}<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
{% endif %}
{% for message in messages %}
{% if message.role == 'tool' %}<tool_response>
{{ {'name': message.name, 'content': message.content, 'id': message.tool_call_id} | tojson }}
</tool_response>
{% else %}{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{% endfor %}{% endif %}{% endfor %}"""


def test_tools_calls_and_results_are_rendered_as_by_transformers(folder: Path) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "description": "é <b>"}}}
    function = {"name": "weather", "description": "Tell the weather.", "parameters": schema}
    arguments = {"city": "Rome", "days": [1, 2.5, None, True]}
    called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    (expected,), _ = render_jinja_template(
        [
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Sure.", "tool_calls": [called, called]},
                {"role": "tool", "content": "sunny", "tool_call_id": "1", "name": "weather"},
            ]
        ],
        tools=[{"type": "function", "function": function}],
        chat_template=HERMES_LIKE,
    )
    call = ToolCall("1", "weather", json.dumps(arguments))
    messages = (HI, Message("assistant", "Sure.", (call, call)), Message("tool", "sunny", tool_call_id="1"))
    template = find_chat_template(HERMES_LIKE, folder, "demo")
    assert template.takes_tools
    tool = Tool("weather", "Tell the weather.", json.dumps(schema))
    assert template.render(messages, tools=[tool]) == expected


@pytest.mark.parametrize("source", ["base", "instruct", "chatml", LLAMA_LIKE, WITH_KWARGS, "<tool_call>{{ messages }}"])
def test_other_templates_do_not_take_tools(source: str) -> None:
    assert not find_chat_template(source, Path("none"), "demo").takes_tools


@pytest.mark.parametrize("name", ["base", "instruct", "chatml"])
@pytest.mark.parametrize("messages", [(HI,), (SYSTEM, HI), (SYSTEM, HI, HELLO, WHO)])
def test_a_built_in_template_begins_the_reply_unless_told_otherwise(name: str, messages: tuple[Message, ...]) -> None:
    template = find_chat_template(name, Path("none"), "demo")
    bare, begun = template.render(messages, add_generation_prompt=False), template.render(messages)
    replied = template.render((*messages, HELLO), add_generation_prompt=False)
    assert messages[-1].content in bare
    assert len(bare) < len(begun)
    assert begun.startswith(bare)
    assert replied.startswith(begun)
    assert replied.rstrip().removesuffix("<|im_end|>").endswith(HELLO.content)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('only one turn, please') }}", "only one turn, please"),
        ("{{ raise_exception('only\n one turn') }}", "only one turn$"),
        ("{{ raise_exception('') }}", "refused by the model's chat template$"),
        ("{{ messages[7].content.strip() }}", "UndefinedError on line 1: list object has no element 7"),
        ("{{ 1 }}\n{% include 'another' %}", "TypeError on line 2: no loader"),
        ("{{ '\ud800' }}", "UnicodeEncodeError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{{ raise_exception.__globals__['json'] }}", "SecurityError"),
        ("{{ self.__init__.__globals__ }}", "SecurityError"),
    ],
)
def test_messages_that_a_template_rejects_or_fails_on_are_reported_as_invalid(source: str, why: str) -> None:
    template = find_chat_template(source, Path("none"), "demo")
    with pytest.raises(InvalidRequestError, match=why) as caught:
        template.render([HI])
    assert [violation.field for violation in caught.value.violations] == ["conversation.messages"]
