"""Turns conversations into prompts that fit in the context, with the model's chat template."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, takewhile

from mpt_grpc.conversation import Conversation, Message
from mpt_grpc.errors import CONTEXT_LENGTH_EXCEEDED, FieldViolation, InvalidRequestError
from mpt_grpc.limits import MAX_COUNTS
from mpt_grpc.text.chat_template import ChatTemplate
from mpt_grpc.text.literals import SpecialTexts, literal_token_ids, strings
from mpt_grpc.text.tools import argument_values, as_plain_messages, tool_texts, tool_violations, without_tags

_ROLES = ("system", "user", "assistant", "tool")
_FIELD = "conversation.messages"
_NO_SPECIAL_TEXTS = SpecialTexts(())
_MAX_ERROR = 1
"""How many tokens an estimate may be off that was corrected by the tokens of a neighbour."""


def conversation_token_ids(
    conversation: Conversation,
    template: ChatTemplate,
    encode: Callable[[str], tuple[int, ...]],
    token_bytes: Callable[[int], bytes],
    max_context_tokens: int,
    max_new_tokens: int | None,
    *,
    special_texts: SpecialTexts = _NO_SPECIAL_TEXTS,
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
    if max_prompt_tokens < 1:
        room = f"no room for a prompt in the context of {max_context_tokens}"
        why = f"{num_new_tokens} new tokens leave {room}: request fewer"
        raise InvalidRequestError(FieldViolation("stopping.max_new_tokens", why, CONTEXT_LENGTH_EXCEEDED))
    prompt = _Prompt(conversation, template, max_context_tokens, max_token_bytes)

    def tokens_without(num_dropped: int) -> tuple[int, ...]:
        texts = prompt.texts(num_dropped)
        return literal_token_ids(lambda change: prompt.rendered(num_dropped, change), texts, special_texts, encode)

    token_ids, num_droppable = tokens_without(0), prompt.turns.num_droppable
    if len(token_ids) > max_prompt_tokens and num_droppable and conversation.drop_oldest_turns:
        sizes = [len(token_bytes(token_id)) for token_id in token_ids]
        estimate = _Estimate(sizes, lambda num_dropped: prompt.rendered(num_dropped).encode(), num_droppable)
        token_ids = _first_fitting(tokens_without, estimate.num_tokens, num_droppable + 1, max_prompt_tokens)
    if len(token_ids) > max_prompt_tokens:
        why = f"{len(token_ids)} + {num_new_tokens} tokens (prompt + output) exceed the context of {max_context_tokens}"
        if (num_left := max_context_tokens - len(token_ids)) > 0:
            why += f": request at most {num_left} or shorten the prompt"
            raise InvalidRequestError(FieldViolation("stopping.max_new_tokens", why, CONTEXT_LENGTH_EXCEEDED))
        raise _too_long(conversation, why)
    return token_ids


class _Prompt:
    """A conversation as the template shows it, whole or without a number of its oldest turns."""

    def __init__(
        self, conversation: Conversation, template: ChatTemplate, max_context_tokens: int, max_token_bytes: int
    ) -> None:
        """Raises InvalidRequestError for a conversation that is certainly too long."""
        self._max_context_tokens, self._max_token_bytes = max_context_tokens, max_token_bytes
        self._conversation, self._template, self._tools = conversation, template, conversation.shown_tools
        self._values_of = cache(argument_values)  # each call is shown several times
        messages = _with_one_leading_system_message(conversation.messages)
        uses_tools = bool(self._tools) or any(message.role == "tool" or message.tool_calls for message in messages)
        self._is_plain = uses_tools and not template.takes_tools
        # First without the arguments of calls, which without_tags parses and may make shorter.
        self.turns = self._fitting(_Turns(messages), lambda message: len(message.content))
        if uses_tools:
            turns = _Turns(without_tags(self.turns.without(0), self._values_of))
            self.turns = self._fitting(turns, _num_characters)

    def rendered(self, num_dropped: int, change: Callable[[str], str] = str) -> str:
        """Returns the text. `change` is applied to all that the caller wrote."""
        messages, tools = self.turns.without(num_dropped), self._tools
        if self._is_plain:
            messages, tools = as_plain_messages(messages, tools), ()
        return self._template.render(
            messages,
            self._conversation.add_generation_prompt,
            self._conversation.chat_template_kwargs,
            tools,
            change,
            values_of=self._values_of,
            continue_final_message=self._conversation.continue_final_message,
        )

    def texts(self, num_dropped: int) -> list[str]:
        """Returns all that the caller wrote."""
        texts = [*strings(self._conversation.chat_template_kwargs)]
        for message in self.turns.without(num_dropped):
            texts += [message.content, message.tool_call_id]
            for call in message.tool_calls:
                texts += [call.id, *strings(self._values_of(call.arguments), with_names=True)]
        for tool in self._tools:
            texts += tool_texts(tool)
        return [text for text in texts if text]

    def _fitting(self, turns: _Turns, size_of: Callable[[Message], int]) -> _Turns:
        """Returns the turns from the first one with which they may fit in the context."""
        sizes = turns.sizes(size_of)
        if not self._conversation.drop_oldest_turns:
            sizes = sizes[:1]
        for num_dropped, size in enumerate(sizes):
            if size <= self._max_context_tokens * self._max_token_bytes:
                return _Turns(turns.without(num_dropped)) if num_dropped else turns
        why = f"{sizes[-1]} characters are too many for the context of {self._max_context_tokens} tokens"
        raise _too_long(self._conversation, why)


class _Estimate:
    """Estimates of the tokens that remain when turns are dropped: those of the dropped bytes are subtracted."""

    def __init__(self, token_sizes: Sequence[int], rendered: Callable[[int], bytes], max_turns: int) -> None:
        """token_sizes: the numbers of bytes of the tokens of the whole conversation."""
        self._ends, self._rendered = list(accumulate(token_sizes)), rendered
        whole = rendered(0)
        self._size, self._start = len(whole), _len_common_prefix(whole, rendered(max_turns))
        self._num_before = bisect_left(self._ends, self._start)

    def num_tokens(self, turns: int) -> int:
        num_dropped_bytes = self._size - len(self._rendered(turns))
        num_dropped = bisect_left(self._ends, self._start + num_dropped_bytes) - self._num_before
        return len(self._ends) - num_dropped


def _len_common_prefix(left: bytes, right: bytes) -> int:
    lengths = range(1, min(len(left), len(right)) + 1)
    return bisect_left(lengths, True, key=lambda length: left[:length] != right[:length])


def _first_fitting(
    tokens_without: Callable[[int], tuple[int, ...]], estimate: Callable[[int], int], num_candidates: int, most: int
) -> tuple[int, ...]:
    """Returns the tokens of the first candidate with at most `most` of them, or else those of the last candidate.

    The first one is known to have more. Computes the tokens of few candidates: of one if the estimates are right.
    """
    too_long, fitting, error = 0, num_candidates, 0
    result: tuple[int, ...] = ()
    while fitting - too_long > 1:
        between = range(too_long + 1, fitting)
        index = bisect_left(between, True, key=lambda turns: estimate(turns) + error <= most)
        if index == len(between) and result and estimate(between[-1]) + error > most + _MAX_ERROR:
            break
        turns = between[min(index, len(between) - 1)]
        token_ids = tokens_without(turns)
        error = len(token_ids) - estimate(turns)
        if len(token_ids) <= most:
            fitting, result = turns, token_ids
        else:
            too_long = turns
    return result or token_ids


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
    last = messages[-1]
    if conversation.continue_final_message:
        if last.role != "assistant" or last.tool_calls:
            why = "only a last message with the role 'assistant' and without calls is continued: add one, or set false"
            violations.append(FieldViolation("conversation.continue_final_message", why))
    elif conversation.add_generation_prompt and last.role in ("system", "assistant"):
        why = "the last message must have the role 'user' or 'tool', unless add_generation_prompt is false"
        if last.role == "assistant":
            why += " or continue_final_message is true"
        violations.append(FieldViolation(f"{_FIELD}[{len(messages) - 1}].role", why))
    for name in sorted(template.reserved_names & conversation.chat_template_kwargs.keys()):
        why = f"{name!r} is set by the server, from the field of this name or the model's files: leave it out"
        violations.append(FieldViolation(f"conversation.chat_template_kwargs[{name}]", why))
    violations += tool_violations(conversation)
    if violations:
        raise InvalidRequestError(*violations)


def _with_one_leading_system_message(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Merges the leading system messages, since most templates expect only one; later ones are left to the template."""
    count = _num_leading_system_messages(messages)
    if count < 2:
        return messages
    return (Message("system", "\n\n".join(message.content for message in messages[:count])), *messages[count:])


def _num_leading_system_messages(messages: Sequence[Message]) -> int:
    return sum(1 for _ in takewhile(lambda message: message.role == "system", messages))


class _Turns:
    """A conversation whose oldest turns may be dropped; the system messages at its beginning stay.

    A turn is a user message and everything up to the next user message.
    """

    def __init__(self, messages: Sequence[Message]) -> None:
        self._messages = messages
        self._num_kept = _num_leading_system_messages(messages)
        starts = (i for i, message in enumerate(messages) if message.role == "user" and i > self._num_kept)
        self._starts = [self._num_kept, *starts]

    @property
    def num_droppable(self) -> int:
        return len(self._starts) - 1

    @property
    def undroppable(self) -> list[int]:
        """The indices of the messages that are shown whatever is dropped."""
        return [*range(self._num_kept), *range(self._starts[-1], len(self._messages))]

    def without(self, num_dropped: int) -> Sequence[Message]:
        """Returns the messages without those of a number of the oldest turns."""
        return [*self._messages[: self._num_kept], *self._messages[self._starts[num_dropped] :]]

    def sizes(self, size_of: Callable[[Message], int]) -> list[int]:
        """Returns the sizes of the messages without 0, 1, 2, ... of the oldest turns."""
        ends = [0, *accumulate(map(size_of, self._messages))]
        return [ends[self._num_kept] + ends[-1] - ends[start] for start in self._starts]


def _num_characters(message: Message) -> int:
    return len(message.content) + sum(len(call.arguments) for call in message.tool_calls)


def _too_long(conversation: Conversation, why: str) -> InvalidRequestError:
    """Returns the error for a conversation that does not fit, which names a part that is longer than the rest."""
    turns = _Turns(conversation.messages)
    shown = turns.undroppable if conversation.drop_oldest_turns else range(len(conversation.messages))
    sizes = {
        "conversation.tools": sum(
            len(tool.name) + len(tool.description) + len(tool.parameters) for tool in conversation.shown_tools
        )
    }
    for index in shown:
        message = conversation.messages[index]
        sizes[field := f"{_FIELD}[{index}]"] = len(message.content)
        for number, call in enumerate(message.tool_calls):
            sizes[f"{field}.tool_calls[{number}]"] = len(call.arguments)
    # Not named, since only the template knows whether it shows them.
    variables = sum(map(len, strings(conversation.chat_template_kwargs)))
    field, what = max(sizes, key=sizes.__getitem__), "it"
    if 2 * sizes[field] <= sum(sizes.values()) + variables:
        parts = (conversation.shown_tools, "the tools or "), (variables, "what chat_template_kwargs add or ")
        field, what = _FIELD, "".join(text for part, text in parts if part) + "the messages"
    dropping = ", or have the oldest turns dropped"
    if conversation.drop_oldest_turns or not turns.num_droppable:
        dropping = ""
    return InvalidRequestError(FieldViolation(field, f"{why}: shorten {what}{dropping}", CONTEXT_LENGTH_EXCEEDED))
