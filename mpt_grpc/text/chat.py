"""Turns conversations into prompts that fit in the context, with the model's chat template."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import dropwhile

from mpt_grpc.errors import FieldViolation, InvalidRequestError
from mpt_grpc.limits import MAX_COUNTS
from mpt_grpc.request import Conversation, Message
from mpt_grpc.text.chat_template import ChatTemplate
from mpt_grpc.text.literals import applied, literal_token_ids, strings

_ROLES = ("system", "user", "assistant")
_FIELD = "conversation.messages"


def conversation_token_ids(
    conversation: Conversation,
    template: ChatTemplate,
    encode: Callable[[str], tuple[int, ...]],
    max_context_tokens: int,
    max_new_tokens: int | None,
    *,
    special_texts: Collection[str] = (),
    max_token_bytes: int = 1 << 20,
) -> tuple[int, ...]:
    """Returns the prompt's tokens, leaving space in the context for `max_new_tokens`, or for one token if it is None.

    If the conversation allows it, as many of the oldest turns as necessary are dropped. What the caller wrote never
    becomes one of the special tokens with these texts. Messages that are certainly too long, as no token has more than
    `max_token_bytes`, are not rendered. Raises InvalidRequestError.
    """
    _check(conversation, template)
    num_new_tokens = 1 if max_new_tokens is None else max_new_tokens
    max_prompt_tokens = max_context_tokens - num_new_tokens

    def tokens_without(turns: int) -> tuple[int, ...]:
        messages, kwargs = candidates[turns], conversation.chat_template_kwargs

        def render(change: Callable[[str], str]) -> str:
            changed = [replace(message, content=change(message.content)) for message in messages]
            return template.render(changed, conversation.add_generation_prompt, applied(change, kwargs))

        texts = [*(message.content for message in messages), *strings(kwargs)]
        return literal_token_ids(render, texts, special_texts, encode)

    messages = _with_one_leading_system_message(conversation.messages)
    candidates = _not_certainly_too_long(_shortened(messages), conversation, max_context_tokens, max_token_bytes)
    token_ids = tokens_without(0)
    if len(token_ids) <= max_prompt_tokens:
        return token_ids
    shortest = tokens_without(len(candidates) - 1) if conversation.drop_oldest_turns else token_ids
    if len(shortest) > max_prompt_tokens:
        lengths = f"{len(shortest)} + {num_new_tokens} tokens (prompt + output)"
        why = f"{lengths} exceed the context of {max_context_tokens}: {_remedy(conversation)}"
        raise InvalidRequestError(FieldViolation(_FIELD, why))
    # Binary search: the smallest sufficient number of turns to drop is above `too_few`, and at most `enough`.
    too_few, enough = 0, len(candidates) - 1
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        token_ids = tokens_without(middle)
        if len(token_ids) <= max_prompt_tokens:
            enough, shortest = middle, token_ids
        else:
            too_few = middle
    return shortest


def _check(conversation: Conversation, template: ChatTemplate) -> None:
    messages = conversation.messages
    violations = []
    if not 1 <= len(messages) <= MAX_COUNTS["conversation.messages"]:
        raise InvalidRequestError(
            FieldViolation(_FIELD, f"{len(messages)} messages; 1 to {MAX_COUNTS['conversation.messages']} are allowed")
        )
    for index, message in enumerate(messages):
        field = f"{_FIELD}[{index}].role"
        if message.role not in _ROLES:
            violations.append(FieldViolation(field, f"unknown role: use one of {', '.join(_ROLES)}"))
    if conversation.add_generation_prompt and messages[-1].role in ("system", "assistant"):
        why = "the last message must have the role 'user', unless add_generation_prompt is false"
        violations.append(FieldViolation(f"{_FIELD}[{len(messages) - 1}].role", why))
    for name in sorted(template.reserved_names & conversation.chat_template_kwargs.keys()):
        why = f"{name!r} is set by the server, from the field of this name or the model's files: leave it out"
        violations.append(FieldViolation(f"conversation.chat_template_kwargs[{name}]", why))
    if violations:
        raise InvalidRequestError(*violations)


def _with_one_leading_system_message(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Merges the leading system messages, of which most templates expect one; later ones are left to the template."""
    rest = list(dropwhile(lambda message: message.role == "system", messages))
    leading = messages[: len(messages) - len(rest)]
    if len(leading) < 2:
        return messages
    return (Message("system", "\n\n".join(message.content for message in leading)), *rest)


def _not_certainly_too_long(
    candidates: list[tuple[Message, ...]], conversation: Conversation, max_context_tokens: int, max_token_bytes: int
) -> list[tuple[Message, ...]]:
    """Returns the candidates from the first one that may fit in the context. Raises InvalidRequestError if none may."""
    most = max_context_tokens * max_token_bytes
    if not conversation.drop_oldest_turns:
        candidates = candidates[:1]
    size = 0
    for number, messages in enumerate(candidates):
        size = sum(len(message.content) for message in messages)
        if size <= most:
            return candidates[number:]
    why = f"{size} characters are too many for the context of {max_context_tokens} tokens: {_remedy(conversation)}"
    raise InvalidRequestError(FieldViolation(_FIELD, why))


def _remedy(conversation: Conversation) -> str:
    return (
        f"shorten {'the last message' if conversation.drop_oldest_turns else 'the messages or set drop_oldest_turns'}"
    )


def _shortened(messages: tuple[Message, ...]) -> list[tuple[Message, ...]]:
    """Returns the messages without their 0, 1, 2, ... oldest turns.

    A turn is a user message and everything up to the next user message.
    """
    system = messages[:1] if messages[0].role == "system" else ()
    starts = [i for i, message in enumerate(messages) if message.role == "user" and i > len(system)]
    return [messages, *(system + messages[start:] for start in starts)]
