"""Turns conversations into prompts that fit in the context, with the model's chat template."""

from __future__ import annotations

from collections.abc import Callable
from itertools import dropwhile

from mpt_grpc.errors import FieldViolation, InvalidRequestError
from mpt_grpc.limits import MAX_COUNTS
from mpt_grpc.request import Conversation, Message
from mpt_grpc.text.chat_template import ChatTemplate

_ROLES = ("system", "user", "assistant")
_FIELD = "conversation.messages"


def conversation_token_ids(
    conversation: Conversation,
    template: ChatTemplate,
    encode: Callable[[str], tuple[int, ...]],
    max_context_tokens: int,
    max_new_tokens: int | None,
) -> tuple[int, ...]:
    """Returns the prompt's tokens, leaving space in the context for `max_new_tokens`, or for one token if it is None.

    If the conversation allows it, as many of the oldest turns as necessary are dropped. Raises InvalidRequestError.
    """
    _check(conversation, template)
    num_new_tokens = 1 if max_new_tokens is None else max_new_tokens
    max_prompt_tokens = max_context_tokens - num_new_tokens

    def tokens_without(turns: int) -> tuple[int, ...]:
        return encode(
            template.render(candidates[turns], conversation.add_generation_prompt, conversation.chat_template_kwargs)
        )

    candidates = _shortened(_with_one_leading_system_message(conversation.messages))
    token_ids = tokens_without(0)
    if len(token_ids) <= max_prompt_tokens:
        return token_ids
    shortest = tokens_without(len(candidates) - 1) if conversation.drop_oldest_turns else token_ids
    if len(shortest) > max_prompt_tokens:
        remedy = "the last message" if conversation.drop_oldest_turns else "the messages or set drop_oldest_turns"
        lengths = f"{len(shortest)} + {num_new_tokens} tokens (prompt + output)"
        why = f"{lengths} exceed the context of {max_context_tokens}: shorten {remedy}"
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


def _shortened(messages: tuple[Message, ...]) -> list[tuple[Message, ...]]:
    """Returns the messages without their 0, 1, 2, ... oldest turns.

    A turn is a user message and everything up to the next user message.
    """
    system = messages[:1] if messages[0].role == "system" else ()
    starts = [i for i, message in enumerate(messages) if message.role == "user" and i > len(system)]
    return [messages, *(system + messages[start:] for start in starts)]
