"""Checks the counts and sizes of a request's fields on the message itself, before any item is looked at."""

from __future__ import annotations

from collections.abc import Iterator

from mpt_grpc.engine.admission import RequestLimits
from mpt_grpc.errors import FieldViolation, InvalidRequestError
from mpt_grpc.limits import (
    MAX_BYTES,
    MAX_CANCELLED,
    MAX_COUNTS,
    MAX_TEXT_CHARACTERS,
    MAX_TOKEN_IDS,
    MAX_TOKENIZED_CHARACTERS,
)
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

SMALL_MESSAGE_BYTES = 32 << 10
"""The size of the largest message of a method without long fields, and room for the short fields of the others."""
_MAX_MESSAGE_BYTES = 3 << 20
"""The largest message of all: the event loop waits while one is parsed, for up to 15 ms a MiB (many empty items)."""
_ID_BYTES = 5  # the largest varint of 32 bits


def largest_message_bytes(limits: RequestLimits) -> dict[str, int]:
    """Returns for each method with long fields the size of the largest message that a legal request needs."""
    text = 4 * MAX_TEXT_CHARACTERS  # UTF-8 has up to 4 bytes for a character
    prompt = max(text, limits.max_prompt_bytes, _ID_BYTES * MAX_TOKEN_IDS)
    ids = _ID_BYTES * (limits.max_context_tokens + limits.vocab_size)
    items = sum((4 if field == "decoding.choice.options" else 16) * count for field, count in MAX_COUNTS.items())
    generate = min(prompt + ids + items + sum(MAX_BYTES.values()) + SMALL_MESSAGE_BYTES, _MAX_MESSAGE_BYTES)
    return {
        "Generate": generate,
        "StreamGenerate": generate,
        "Tokenize": 4 * MAX_TOKENIZED_CHARACTERS + SMALL_MESSAGE_BYTES,
        "Detokenize": _ID_BYTES * MAX_TOKEN_IDS + SMALL_MESSAGE_BYTES,
        "Cancel": (MAX_BYTES["request_id"] + 4) * MAX_CANCELLED + SMALL_MESSAGE_BYTES,
    }


def check_sizes(message: pb.GenerateRequest, limits: RequestLimits) -> None:
    """Raises InvalidRequestError with every field that is too long; takes microseconds, whatever the message holds."""
    if violations := list(_violations(message, limits)):
        raise InvalidRequestError(*violations)


def _violations(message: pb.GenerateRequest, limits: RequestLimits) -> Iterator[FieldViolation]:
    decoding, stopping = message.decoding, message.stopping
    max_prompt_ids = MAX_TOKEN_IDS if message.HasField("truncate_prompt_tokens") else limits.max_context_tokens
    for field, count, most in (
        ("token_ids.ids", len(message.token_ids.ids), max_prompt_ids),
        ("conversation.messages", len(message.conversation.messages), MAX_COUNTS["conversation.messages"]),
        ("resume_token_ids", len(message.resume_token_ids), limits.max_context_tokens - 1),
        ("decoding.allowed_token_ids", len(decoding.allowed_token_ids), limits.vocab_size),
        ("decoding.choice.options", len(decoding.choice.options), MAX_COUNTS["decoding.choice.options"]),
        ("decoding.logit_bias", len(decoding.logit_bias), MAX_COUNTS["decoding.logit_bias"]),
        ("stopping.stop_strings", len(stopping.stop_strings), MAX_COUNTS["stopping.stop_strings"]),
        ("stopping.stop_token_ids", len(stopping.stop_token_ids), MAX_COUNTS["stopping.stop_token_ids"]),
    ):
        if count > most:
            yield FieldViolation(field, f"{count} items; at most {most} are allowed")
    most = MAX_BYTES["conversation.chat_template_kwargs"]
    if (size := len(message.conversation.chat_template_kwargs.encode())) > most:
        yield FieldViolation("conversation.chat_template_kwargs", f"{size} bytes; at most {most} are allowed")
