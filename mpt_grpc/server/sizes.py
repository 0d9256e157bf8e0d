"""Checks the counts and sizes of a request, first on its bytes, then on its message, before any item is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf.descriptor import MethodDescriptor

from mpt_grpc.engine.validation import RequestLimits
from mpt_grpc.errors import CONTEXT_LENGTH_EXCEEDED, FieldViolation, InvalidRequestError
from mpt_grpc.limits import (
    MAX_BYTES,
    MAX_CANCELLED,
    MAX_COUNTS,
    MAX_TEXT_CHARACTERS,
    MAX_TOKEN_IDS,
    MAX_TOKENIZED_CHARACTERS,
)
from mpt_grpc.server.wire import field_beyond
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

_SMALL_MESSAGE_BYTES = 32 << 10
"""The size of the largest message of a method without long fields, and room for the short fields of the others."""
_MAX_MESSAGE_BYTES = 3 << 20
_MAX_FIELDS = 15_000
"""More than the fields of any legal message: 4,096 options, 1,024 messages, 1,024 biases, 512 calls and 128 tools have
14,464 together.

Lists of numbers are one field each, as every generated stub packs them.
"""
_PARSED_UNCOUNTED_BYTES = 128 << 10
"""Messages up to this size are parsed in 2 ms, whatever they hold; larger ones, with many empty items, in 45 ms."""
_ID_BYTES = 5  # the largest varint of 32 bits


class MessageLimits:
    """How large a serialized message may be, and how many fields it may have, so that it is parsed in milliseconds."""

    def __init__(self, limits: RequestLimits) -> None:
        num_ids = MAX_TOKEN_IDS + limits.max_context_tokens + limits.vocab_size
        self._max_numbers = MAX_TOKEN_IDS + num_ids
        self._max_counts = {
            **MAX_COUNTS,
            "token_ids.ids": MAX_TOKEN_IDS,
            "resume_token_ids": limits.max_context_tokens - 1,
            "resume_outputs.token_ids": MAX_TOKEN_IDS,
            "decoding.allowed_token_ids": limits.vocab_size,
        }
        text = 4 * MAX_TEXT_CHARACTERS  # UTF-8 has up to 4 bytes for a character
        prompt = max(text, limits.max_prompt_bytes, _ID_BYTES * MAX_TOKEN_IDS)
        items = 16 * sum(MAX_COUNTS.values()) + sum(MAX_BYTES.values())
        generate = prompt + _ID_BYTES * num_ids + items + _SMALL_MESSAGE_BYTES
        self.max_generate_bytes = min(generate, _MAX_MESSAGE_BYTES)
        """The size of the largest message that a legal `Generate` needs."""
        self._max_bytes = {
            "Generate": self.max_generate_bytes,
            "StreamGenerate": self.max_generate_bytes,
            "Tokenize": 4 * MAX_TOKENIZED_CHARACTERS + _SMALL_MESSAGE_BYTES,
            "Detokenize": _ID_BYTES * MAX_TOKEN_IDS + _SMALL_MESSAGE_BYTES,
            "Cancel": (MAX_BYTES["request_id"] + 4) * MAX_CANCELLED + _SMALL_MESSAGE_BYTES,
        }

    def check(self, data: bytes, method: MethodDescriptor) -> None:
        """Raises InvalidRequestError for a message of a method that is too large to be parsed, or DecodeError."""
        most = self._max_bytes.get(method.name, _SMALL_MESSAGE_BYTES)
        if len(data) > most:
            raise InvalidRequestError(FieldViolation("request", f"{len(data)} bytes; at most {most} are allowed"))
        if len(data) > _PARSED_UNCOUNTED_BYTES:
            field = field_beyond(data, method.input_type, _MAX_FIELDS, self._max_numbers)
            if field is not None:
                most = self._max_counts.get(field, _MAX_FIELDS)
                raise InvalidRequestError(FieldViolation(field, f"too many items; at most {most} are allowed"))


def check_sizes(message: pb.GenerateRequest, limits: RequestLimits) -> None:
    """Raises InvalidRequestError with every field that is too long; takes microseconds, whatever the message holds."""
    if violations := list(_violations(message, limits)):
        raise InvalidRequestError(*violations)


def _violations(message: pb.GenerateRequest, limits: RequestLimits) -> Iterator[FieldViolation]:
    conversation = message.conversation
    yield from _too_many(_lists_in_context(message, limits.max_context_tokens), CONTEXT_LENGTH_EXCEEDED)
    yield from _too_many(_other_lists(message, limits))
    sizes = {
        "request_id": len(message.request_id.encode()),  # which is an attribute of spans
        "conversation.chat_template_kwargs": len(conversation.chat_template_kwargs.encode()),
        "conversation.tools": sum(tool.ByteSize() for tool in conversation.tools[: MAX_COUNTS["conversation.tools"]]),
        "cache.salt": len(message.cache.salt.encode()),
        "resume_fingerprint": len(message.resume_fingerprint.encode()),
    }
    for field, size in sizes.items():
        if size > MAX_BYTES[field]:
            yield FieldViolation(field, f"{size} bytes; at most {MAX_BYTES[field]} are allowed")
    yield from _call_violations(conversation.messages[: MAX_COUNTS["conversation.messages"]])


def _too_many(lists: Iterable[tuple[str, int, int]], reason: str = "") -> Iterator[FieldViolation]:
    """Yields the violations of lists, each given as its field, its number of items and the maximum."""
    for field, count, most in lists:
        if count > most:
            yield FieldViolation(field, f"{count} items; at most {most} are allowed", reason)


def _lists_in_context(message: pb.GenerateRequest, max_context_tokens: int) -> Iterator[tuple[str, int, int]]:
    """Yields the lists of tokens that have to fit in the context, as `_too_many` takes them."""
    if not message.HasField("truncate_prompt_tokens"):
        yield "token_ids.ids", len(message.token_ids.ids), max_context_tokens
    yield "resume_token_ids", len(message.resume_token_ids), max_context_tokens - 1
    for number, output in enumerate(message.resume_outputs[: MAX_COUNTS["resume_outputs"]]):
        yield f"resume_outputs[{number}].token_ids", len(output.token_ids), max_context_tokens - 1


def _other_lists(message: pb.GenerateRequest, limits: RequestLimits) -> Iterator[tuple[str, int, int]]:
    """Yields the other lists."""
    decoding, stopping, conversation = message.decoding, message.stopping, message.conversation
    if message.HasField("truncate_prompt_tokens"):
        yield "token_ids.ids", len(message.token_ids.ids), MAX_TOKEN_IDS
    yield "conversation.messages", len(conversation.messages), MAX_COUNTS["conversation.messages"]
    yield "conversation.tools", len(conversation.tools), MAX_COUNTS["conversation.tools"]
    yield "conversation.allowed_tools", len(conversation.allowed_tools), MAX_COUNTS["conversation.allowed_tools"]
    yield "resume_outputs", len(message.resume_outputs), MAX_COUNTS["resume_outputs"]
    yield "resume_outputs.token_ids", sum(len(o.token_ids) for o in message.resume_outputs), MAX_TOKEN_IDS
    yield "decoding.allowed_token_ids", len(decoding.allowed_token_ids), limits.vocab_size
    yield "decoding.choice.options", len(decoding.choice.options), MAX_COUNTS["decoding.choice.options"]
    yield "decoding.logit_bias", len(decoding.logit_bias), MAX_COUNTS["decoding.logit_bias"]
    yield "stopping.stop_strings", len(stopping.stop_strings), MAX_COUNTS["stopping.stop_strings"]
    yield "stopping.stop_token_ids", len(stopping.stop_token_ids), MAX_COUNTS["stopping.stop_token_ids"]


def _call_violations(messages: Iterable[pb.Message]) -> Iterator[FieldViolation]:
    num_calls = size = 0
    longest, most = (0, ""), MAX_BYTES["conversation.messages.tool_call_id"]
    for index, message in enumerate(messages):
        path = f"conversation.messages[{index}]"
        longest = max(longest, (len(message.tool_call_id.encode()), f"{path}.tool_call_id"))
        if calls := message.tool_calls:
            num_calls += len(calls)
            if num_calls > MAX_COUNTS["conversation.messages.tool_calls"]:
                why = f"more than {MAX_COUNTS['conversation.messages.tool_calls']} calls in all messages"
                yield FieldViolation("conversation.messages.tool_calls", why)
                return
            size += sum(call.ByteSize() for call in calls)
            ids = ((len(call.id.encode()), f"{path}.tool_calls[{number}].id") for number, call in enumerate(calls))
            longest = max(longest, *ids)
    if size > MAX_BYTES["conversation.messages.tool_calls"]:
        allowed = f"at most {MAX_BYTES['conversation.messages.tool_calls']} are allowed"
        yield FieldViolation("conversation.messages.tool_calls", f"{size} bytes of calls in all messages; {allowed}")
    if longest[0] > most:
        yield FieldViolation(longest[1], f"{longest[0]} bytes; at most {most} are allowed")
