"""Conversations: their checks, and fitting them into the context."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt_grpc.conversation import Conversation, Message, Tool, ToolCall
from mpt_grpc.errors import InvalidRequestError
from mpt_grpc.limits import MAX_COUNTS
from mpt_grpc.text.chat import conversation_token_ids
from mpt_grpc.text.chat_template import ChatTemplate
from mpt_grpc.text.template_sources import find_chat_template

SYSTEM = Message("system", "Be short.")
HI = Message("user", "Hi")
HELLO = Message("assistant", "Hello!")
WHO = Message("user", "Who are you?")


def encode(text: str) -> tuple[int, ...]:
    """Encodes each character as one token."""
    return tuple(map(ord, text))


def token_bytes(token_id: int) -> bytes:
    return chr(token_id).encode()


def prompt_text(*messages: Message, context: int = 1000, new: int | None = None, drop: bool = False) -> str:
    """Returns the prompt for a conversation, rendered with the 'base' template, as text."""
    template = find_chat_template("base", Path("none"), "demo")
    ids = conversation_token_ids(Conversation(messages, drop), template, encode, token_bytes, context, new)
    return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        ((), ["conversation.messages"]),
        ((HI,) * (MAX_COUNTS["conversation.messages"] + 1), ["conversation.messages"]),
        ((HI, HELLO), ["conversation.messages[1].role"]),
        ((SYSTEM,), ["conversation.messages[0].role"]),
        (
            (Message("", "a"), HI, Message("robot", "b"), HI),
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


@pytest.mark.parametrize("messages", [(HI, HELLO), (HI, SYSTEM), (HELLO,), (SYSTEM,), (HI,)])
def test_without_the_beginning_of_a_reply_the_last_message_may_have_any_role(messages: tuple[Message, ...]) -> None:
    template = find_chat_template("base", Path("none"), "demo")
    conversation = Conversation(messages, add_generation_prompt=False)
    assert conversation_token_ids(conversation, template, encode, token_bytes, 1000, 1) == encode(
        template.render(messages, False)
    )


@pytest.mark.parametrize(
    "messages", [(HI,), (HI, HELLO, SYSTEM), (HI, Message("assistant", "", (ToolCall("1", "run", "{}"),)))]
)
def test_only_a_last_message_of_the_assistant_without_calls_is_continued(messages: tuple[Message, ...]) -> None:
    template = find_chat_template("base", Path("none"), "demo")
    conversation = Conversation(messages, continue_final_message=True)
    with pytest.raises(InvalidRequestError) as caught:
        conversation_token_ids(conversation, template, encode, token_bytes, 1000, 1)
    assert [violation.field for violation in caught.value.violations] == ["conversation.continue_final_message"]


def test_a_continued_message_stays_when_turns_are_dropped() -> None:
    template = find_chat_template("{% for m in messages %}{{ m.content }}|{% endfor %}", Path("none"), "demo")
    messages = (HI, HELLO, WHO, Message("assistant", "I am a"))
    for context, expected in ((40, "Hi|Hello!|Who are you?|I am a"), (22, "Who are you?|I am a")):
        conversation = Conversation(messages, drop_oldest_turns=True, continue_final_message=True)
        ids = conversation_token_ids(conversation, template, encode, token_bytes, context, 1)
        assert "".join(map(chr, ids)) == expected


def test_names_that_the_server_sets_are_refused_as_template_kwargs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "image_token": "<i>"}')
    template = find_chat_template("base", tmp_path, "demo")
    names = ("add_generation_prompt", "eos_token", "image_token", "messages", "raise_exception", "strftime_now")
    kwargs = dict.fromkeys((*names, "bos_token", "tools", "documents", "mine"))
    with pytest.raises(InvalidRequestError) as caught:
        conversation_token_ids(Conversation((HI,), chat_template_kwargs=kwargs), template, encode, token_bytes, 1000, 1)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == [f"conversation.chat_template_kwargs[{name}]" for name in names]


def test_template_kwargs_apply_however_many_turns_are_dropped() -> None:
    template = find_chat_template("{{ style }}{% for m in messages %}{{ m.content }}{% endfor %}", Path("none"), "demo")
    for context in (30, 20):
        conversation = Conversation((HI, HELLO, WHO), drop_oldest_turns=True, chat_template_kwargs={"style": "dry:"})
        ids = conversation_token_ids(conversation, template, encode, token_bytes, context, 1)
        assert "".join(map(chr, ids)) == ("dry:HiHello!Who are you?" if context == 30 else "dry:Who are you?")


def test_maximum_number_of_messages_is_accepted() -> None:
    assert (
        prompt_text(*(HI,) * MAX_COUNTS["conversation.messages"], context=100_000).count("User: Hi")
        == MAX_COUNTS["conversation.messages"]
    )


def test_conversation_that_is_too_long_is_rejected_with_both_token_counts() -> None:
    prompt = prompt_text(SYSTEM, HI, HELLO, WHO)
    assert prompt_text(SYSTEM, HI, HELLO, WHO, context=len(prompt) + 5, new=5) == prompt
    assert prompt_text(SYSTEM, HI, HELLO, WHO, context=len(prompt) + 1) == prompt
    with pytest.raises(InvalidRequestError) as caught:
        prompt_text(SYSTEM, HI, HELLO, WHO, context=len(prompt), new=5)
    (violation,) = caught.value.violations
    assert violation.field == "conversation.messages"
    assert f"{len(prompt)} + 5 tokens (prompt + output) exceed the context of {len(prompt)}" in violation.description
    assert "have the oldest turns dropped" in violation.description


def test_more_new_tokens_than_the_conversation_leaves_are_refused_as_such() -> None:
    prompt = prompt_text(SYSTEM, HI, HELLO, WHO)
    with pytest.raises(InvalidRequestError, match=r"stopping\.max_new_tokens: .*: request at most 4 or shorten"):
        prompt_text(SYSTEM, HI, HELLO, WHO, context=len(prompt) + 4, new=5)


LONG = "a" * 900
CALL, LONG_CALL = ToolCall("c", "f", "{}"), ToolCall("d", "f", f'{{"a": "{LONG}"}}')


@pytest.mark.parametrize("max_token_bytes", [1, 1000], ids=["by its characters", "by its tokens"])
@pytest.mark.parametrize(
    ("messages", "drop", "field"),
    [
        ((Message("system", LONG), HI), False, "messages[0]"),
        ((Message("system", LONG), HI), True, "messages[0]"),
        ((SYSTEM, Message("system", LONG), HI), True, "messages[1]"),
        ((SYSTEM, Message("user", LONG), HELLO, WHO), False, "messages[1]"),
        ((Message("user", LONG * 2), HELLO, Message("user", LONG)), True, "messages[2]"),
        ((Message("user", LONG), HELLO, Message("user", LONG)), False, "messages"),
        ((HI, Message("assistant", "", (CALL, LONG_CALL)), WHO), False, "messages[1].tool_calls[1]"),
    ],
)
def test_a_message_that_is_longer_than_all_others_is_named(
    messages: tuple[Message, ...], drop: bool, field: str, max_token_bytes: int
) -> None:
    template = find_chat_template("base", Path("none"), "demo")
    with pytest.raises(InvalidRequestError) as caught:
        conversation_token_ids(
            Conversation(messages, drop), template, encode, token_bytes, 800, None, max_token_bytes=max_token_bytes
        )
    assert [violation.field for violation in caught.value.violations] == [f"conversation.{field}"]


def test_tools_that_are_longer_than_all_messages_are_named() -> None:
    template = find_chat_template("{{ tools }}{{ messages }}", Path("none"), "demo")
    with pytest.raises(InvalidRequestError, match=r"conversation\.tools: .*: shorten it$"):
        conversation_token_ids(
            Conversation((HI,), tools=(Tool("f", LONG, ""),)), template, encode, token_bytes, 800, None
        )


@pytest.mark.parametrize("text", ["{{ style }}{{ messages }}", "{{ messages }}"], ids=["shown", "not shown"])
def test_no_message_is_blamed_for_variables_that_are_longer(text: str) -> None:
    template = find_chat_template(text, Path("none"), "demo")
    conversation = Conversation((Message("user", LONG),), chat_template_kwargs={"style": [LONG * 2]})
    with pytest.raises(
        InvalidRequestError, match=r"messages: .*: shorten what chat_template_kwargs add or the messages$"
    ):
        conversation_token_ids(conversation, template, encode, token_bytes, 800, None)


@pytest.mark.parametrize(
    ("messages", "ending"),
    [
        ((Message("user", LONG), HELLO, HI), "shorten it, or have the oldest turns dropped"),
        ((SYSTEM, Message("user", LONG)), "shorten it"),
    ],
)
def test_turns_are_to_be_dropped_where_there_are_any(messages: tuple[Message, ...], ending: str) -> None:
    template = find_chat_template("base", Path("none"), "demo")
    with pytest.raises(InvalidRequestError, match=rf": {ending}$"):
        conversation_token_ids(Conversation(messages), template, encode, token_bytes, 800, None)


@pytest.mark.parametrize("drop", [False, True])
def test_more_new_tokens_than_the_context_has_are_refused_as_such(drop: bool) -> None:
    with pytest.raises(InvalidRequestError, match=r"stopping\.max_new_tokens: 1000 new tokens leave no room"):
        prompt_text(HI, context=1000, new=1000, drop=drop)


def test_oldest_turns_are_dropped_on_request() -> None:
    whole = prompt_text(SYSTEM, HI, HELLO, WHO)
    assert prompt_text(SYSTEM, HI, HELLO, WHO, context=len(whole) + 1, drop=True) == whole
    assert prompt_text(SYSTEM, HI, HELLO, WHO, context=len(whole), drop=True) == prompt_text(SYSTEM, WHO)


def test_last_message_that_is_too_long_by_itself_is_rejected() -> None:
    shortest = prompt_text(SYSTEM, WHO)
    assert prompt_text(SYSTEM, HI, HELLO, WHO, context=len(shortest) + 1, drop=True) == shortest
    with pytest.raises(InvalidRequestError, match=rf"messages\[3]: {len(shortest)} \+ 1 tokens .*shorten it"):
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
            conversation_token_ids(conversation, template, counting, token_bytes, context, new)
        assert len(encoded) <= 2
    else:
        assert conversation_token_ids(conversation, template, counting, token_bytes, context, new) == encode(expected)
        assert len(encoded) <= 2 + (expected != template.render(messages))  # twice, or once more to be sure


@pytest.mark.parametrize("name", ["base", "instruct", "chatml"])
def test_leading_system_messages_are_merged_and_later_ones_stay_in_place(tmp_path: Path, name: str) -> None:
    template = find_chat_template(name, tmp_path, "demo")
    prompts: list[str] = []

    def encode(text: str) -> tuple[int, ...]:
        prompts.append(text)
        return (1,)

    messages = (SYSTEM, Message("system", "Be kind."), HI, HELLO, Message("system", "Now rhyme."), WHO)
    conversation_token_ids(Conversation(messages), template, encode, token_bytes, 100, 10)
    merged = (Message("system", "Be short.\n\nBe kind."), *messages[2:])
    assert prompts == [template.render(merged)]
    places = [prompts[0].index(text) for text in ("Be short.", "Be kind.", HI.content, "Now rhyme.", WHO.content)]
    assert places == sorted(places)
