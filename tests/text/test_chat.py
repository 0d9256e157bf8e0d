"""Chat templates: rendering, where they are loaded from, and fitting conversations into the context."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from mpt_grpc.errors import InvalidRequestError, ModelError, SettingsError
from mpt_grpc.request import Conversation, Message
from mpt_grpc.text.chat import MAX_MESSAGES, ChatTemplate, conversation_token_ids, find_chat_template

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
{{ [message.content] | tojson(indent=2) }}{{ eos_token }}
    {% generation %}
{{ message.content }}
    {% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""


def rendered(name: str, *messages: Message) -> str:
    return find_chat_template(name, Path("no such folder"), "demo").render(messages)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes a tokenizer_config.json with the given fields and returns its folder."""

    def write(**config: Any) -> Path:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


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


@pytest.mark.parametrize(
    ("name", "stop_strings"),
    [("base", ("\nUser:",)), ("instruct", ("\n### Instruction:",)), ("chatml", ("<|im_end|>",))],
)
def test_built_in_templates_stop_where_the_next_turn_would_begin(name: str, stop_strings: tuple[str, ...]) -> None:
    assert find_chat_template(name, Path("none"), "demo").stop_strings == stop_strings


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("mpt-7b-instruct", "instruct"),
        ("MPT-30B-Instruct", "instruct"),
        ("mpt-7b-chat", "chatml"),
        ("mpt-7b", "base"),
        ("chat-7b", "base"),
    ],
)
def test_model_without_a_template_gets_one_by_its_name(tmp_path: Path, model: str, name: str) -> None:
    assert find_chat_template("auto", tmp_path, model).name == name


@pytest.mark.parametrize("source", [LLAMA_LIKE, JSON_LIKE])
@pytest.mark.parametrize(
    "messages", [(HI,), (SYSTEM, HI), (HI, HELLO, WHO), (SYSTEM, HI, HELLO, Message("user", "é <b>\n"))]
)
@pytest.mark.parametrize("place", ["string", "list", "file"])
def test_models_own_template_is_rendered_as_by_transformers(
    save: Callable[..., Path], source: str, messages: tuple[Message, ...], place: str
) -> None:
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    match place:
        case "string":
            folder = save(chat_template=source, **tokens)
        case "list":
            entries = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": source}]
            folder = save(chat_template=entries, **tokens)
        case _:
            folder = save(chat_template="the file takes precedence", **tokens)
            (folder / "chat_template.jinja").write_text(source)
    template = find_chat_template("auto", folder, "mpt-7b-chat")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    (expected,), _ = render_jinja_template(
        [turns], chat_template=source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert template.name == "model"
    assert template.render(messages) == expected


def test_template_containing_im_end_uses_it_as_a_stop_string(save: Callable[..., Path]) -> None:
    folder = save(chat_template="{{ messages[0].content }}<|im_end|>")
    assert find_chat_template("auto", folder, "demo").stop_strings == ("<|im_end|>",)


def test_given_template_file_takes_precedence_over_the_models_own(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save(chat_template="own", eos_token="</s>")
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}{{ eos_token }}")
    template = find_chat_template(str(file), folder, "demo")
    assert (template.name, template.stop_strings, template.render([HI])) == ("file", (), "Hi</s>")
    assert find_chat_template("base", folder, "demo").name == "base"


def test_unknown_template_raises_an_error_that_lists_the_built_in_ones(tmp_path: Path) -> None:
    expected = "--chat-template: expected auto, base, instruct, chatml or a readable file, got 'alpaca'"
    with pytest.raises(SettingsError, match=expected):
        find_chat_template("alpaca", tmp_path, "demo")


def test_syntax_error_in_a_template_file_is_reported_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}\n{{ m.content }}\n{% endif %}")
    with pytest.raises(SettingsError, match=r"mine\.jinja, line 3: "):
        find_chat_template(str(file), tmp_path, "demo")


@pytest.mark.parametrize(
    "template",
    ["a\n{% if %}", 7, [{"name": "default", "template": 7}], {"default": "a"}],
)
def test_invalid_template_of_a_model_raises_model_error(save: Callable[..., Path], template: Any) -> None:
    folder = save(chat_template=template)
    with pytest.raises(ModelError, match=str(folder)):
        find_chat_template("auto", folder, "demo")
    assert find_chat_template("base", folder, "demo").name == "base"


def test_tokenizer_config_that_is_not_json_raises_model_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        find_chat_template("auto", tmp_path, "demo")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('only one turn, please') }}", "only one turn, please"),
        ("{{ messages[7].content.strip() }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{{ raise_exception.__globals__['json'] }}", "SecurityError"),
        ("{{ self.__init__.__globals__ }}", "SecurityError"),
    ],
)
def test_messages_that_a_template_rejects_or_fails_on_are_reported_as_invalid(
    save: Callable[..., Path], source: str, why: str
) -> None:
    template = find_chat_template("auto", save(chat_template=source), "demo")
    with pytest.raises(InvalidRequestError, match=why) as caught:
        template.render([HI])
    assert [violation.field for violation in caught.value.violations] == ["conversation.messages"]


def encode(text: str) -> tuple[int, ...]:
    """Encodes each character as one token."""
    return tuple(map(ord, text))


def prompt_text(*messages: Message, context: int = 1000, new: int | None = None, drop: bool = False) -> str:
    """Returns the prompt for a conversation, rendered with the 'base' template, as text."""
    template = find_chat_template("base", Path("none"), "demo")
    ids = conversation_token_ids(Conversation(messages, drop), template, encode, context, new)
    return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        ((), ["conversation.messages"]),
        ((HI,) * (MAX_MESSAGES + 1), ["conversation.messages"]),
        ((HI, HELLO), ["conversation.messages[1].role"]),
        ((SYSTEM,), ["conversation.messages[0].role"]),
        (
            (Message("", "a"), HI, Message("tool", "b"), HI),
            ["conversation.messages[0].role", "conversation.messages[2].role"],
        ),
        ((HI, Message("", "a")), ["conversation.messages[1].role"]),
        ((Message("", "a"), HI, HELLO), ["conversation.messages[0].role", "conversation.messages[2].role"]),
    ],
)
def test_messages_with_wrong_roles_are_all_reported(messages: tuple[Message, ...], fields: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        prompt_text(*messages)
    assert [violation.field for violation in caught.value.violations] == fields


def test_maximum_number_of_messages_is_accepted() -> None:
    assert prompt_text(*(HI,) * MAX_MESSAGES, context=100_000).count("User: Hi") == MAX_MESSAGES


def test_conversation_that_is_too_long_is_rejected_with_both_token_counts() -> None:
    prompt = prompt_text(SYSTEM, HI, HELLO, WHO)
    assert prompt_text(SYSTEM, HI, HELLO, WHO, context=len(prompt) + 5, new=5) == prompt
    assert prompt_text(SYSTEM, HI, HELLO, WHO, context=len(prompt) + 1) == prompt
    with pytest.raises(InvalidRequestError) as caught:
        prompt_text(SYSTEM, HI, HELLO, WHO, context=len(prompt) + 4, new=5)
    (violation,) = caught.value.violations
    assert violation.field == "conversation.messages"
    assert (
        f"{len(prompt)} + 5 tokens (prompt + output) exceed the context of {len(prompt) + 4}" in violation.description
    )
    assert "drop_oldest_turns" in violation.description
    with pytest.raises(InvalidRequestError):
        prompt_text(SYSTEM, HI, HELLO, WHO, context=len(prompt))


def test_oldest_turns_are_dropped_on_request() -> None:
    whole = prompt_text(SYSTEM, HI, HELLO, WHO)
    assert prompt_text(SYSTEM, HI, HELLO, WHO, context=len(whole) + 1, drop=True) == whole
    assert prompt_text(SYSTEM, HI, HELLO, WHO, context=len(whole), drop=True) == prompt_text(SYSTEM, WHO)


def test_last_message_that_is_too_long_by_itself_is_rejected() -> None:
    shortest = prompt_text(SYSTEM, WHO)
    assert prompt_text(SYSTEM, HI, HELLO, WHO, context=len(shortest) + 1, drop=True) == shortest
    with pytest.raises(InvalidRequestError, match=rf"{len(shortest)} \+ 1 tokens .*shorten the last message"):
        prompt_text(SYSTEM, HI, HELLO, WHO, context=len(shortest), drop=True)


words = st.text("ab ", max_size=12)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    """User and assistant messages in any order, with or without a system message; the last is the user's."""
    turns = draw(st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), words), max_size=20))
    system = draw(st.sampled_from([(), (SYSTEM,)]))
    return (*system, *turns, Message("user", draw(words)))


@given(messages=conversations(), context=st.integers(20, 500), new=st.integers(0, 20))
def test_no_more_turns_are_dropped_than_necessary(messages: tuple[Message, ...], context: int, new: int) -> None:
    template: ChatTemplate = find_chat_template("chatml", Path("none"), "demo")
    encoded = []

    def counting(text: str) -> tuple[int, ...]:
        encoded.append(text)
        return encode(text)

    system = messages[:1] if messages[0] is SYSTEM else ()
    turns = messages[len(system) :]
    # The messages that are kept begin with the first one or with a user message.
    kept = [system + turns[i:] for i, turn in enumerate(turns) if i == 0 or turn.role == "user"]
    fitting = (prompt for prompt in map(template.render, kept) if len(prompt) + new <= context)
    expected = next(fitting, None)
    conversation = Conversation(messages, drop_oldest_turns=True)
    if expected is None:
        with pytest.raises(InvalidRequestError):
            conversation_token_ids(conversation, template, counting, context, new)
        assert len(encoded) <= 2
    else:
        assert conversation_token_ids(conversation, template, counting, context, new) == encode(expected)
        assert len(encoded) <= 2 + log2(len(kept)) + 1


@pytest.mark.parametrize("name", ["base", "instruct", "chatml"])
def test_leading_system_messages_are_merged_and_later_ones_stay_in_place(tmp_path: Path, name: str) -> None:
    template = find_chat_template(name, tmp_path, "demo")
    prompts: list[str] = []

    def encode(text: str) -> tuple[int, ...]:
        prompts.append(text)
        return (1,)

    messages = (SYSTEM, Message("system", "Be kind."), HI, HELLO, Message("system", "Now rhyme."), WHO)
    conversation_token_ids(Conversation(messages), template, encode, 100, 10)
    merged = (Message("system", "Be short.\n\nBe kind."), *messages[2:])
    assert prompts == [template.render(merged)]
    places = [prompts[0].index(text) for text in ("Be short.", "Be kind.", HI.content, "Now rhyme.", WHO.content)]
    assert places == sorted(places)
