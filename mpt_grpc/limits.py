"""The limits of a request's fields, in one table, by the paths of the fields in the API.

HTTP bodies, messages and requests are checked against it, and tests hold the proto's comments and docs/generation.md to
it. Limits that depend on the model, such as the context, are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, with or without `low` itself."""

    low: float
    high: float
    excludes_low: bool = False
    hint: str = ""
    """What one value means, for the error."""

    def __contains__(self, value: float) -> bool:
        # Every comparison with NaN is false, so NaN is outside every range.
        return (self.low < value if self.excludes_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.excludes_low else '['}{self.low}, {self.high}]{'; ' if self.hint else ''}{self.hint}"


RANGES: Mapping[str, Range] = {
    "priority": Range(-100, 100),
    "sampling.temperature": Range(0, 100),
    "sampling.top_p": Range(0, 1, excludes_low=True, hint="1 keeps all tokens"),
    "sampling.min_p": Range(0, 1),
    "sampling.typical_p": Range(0, 1, excludes_low=True, hint="1 keeps all tokens"),
    "sampling.num_sequences": Range(1, 16),
    "decoding.repetition_penalty": Range(0, 10, excludes_low=True, hint="1 applies no penalty"),
    "decoding.frequency_penalty": Range(-2, 2),
    "decoding.presence_penalty": Range(-2, 2),
    "decoding.logit_bias": Range(-100, 100),
    "decoding.max_whitespace": Range(0, 8),
    "stopping.repetition_guard.min_repeats": Range(2, 1000),
    "stopping.repetition_guard.max_cycle_tokens": Range(1, 256),
    "output_options.top_logprobs": Range(0, 20),
    "output_options.chunk_tokens": Range(1, 1024),
}
"""The ranges of numbers, and of the values of maps."""

MAX_COUNTS: Mapping[str, int] = {
    "conversation.messages": 1024,
    "conversation.messages.tool_calls": 512,
    "conversation.tools": 128,
    "conversation.allowed_tools": 128,
    "decoding.choice.options": 4096,
    "decoding.logit_bias": 1024,
    "resume_outputs": 16,
    "stopping.stop_strings": 16,
    "stopping.stop_token_ids": 64,
}
"""The largest numbers of items of lists and maps. The calls of all messages count together."""

MAX_BYTES: Mapping[str, int] = {
    "request_id": 128,
    "model": 256,
    "resume_fingerprint": 256,
    "cache.salt": 128,
    "conversation.chat_template_kwargs": 16 << 10,
    "conversation.messages.tool_call_id": 256,
    "conversation.messages.tool_calls": 262_144,
    "conversation.tools": 65_536,
    "decoding.choice.options": 65_536,
    "decoding.json_schema": 65_536,
    "decoding.lark_grammar": 65_536,
    "decoding.regex": 65_536,
    "stopping.stop_strings": 256,
}
"""The largest sizes of texts in UTF-8. Choices, tools and calls count together, stop strings each by itself."""

MAX_TOOL_NAME_CHARACTERS = 64
"""The longest name of a tool."""
MAX_PARALLEL_CALLS = 16
"""The most calls of tools that one output makes."""

MAX_TEXT_CHARACTERS = 1 << 18
"""The longest text that may be truncated, even if fewer of its tokens are kept."""
MAX_TOKEN_IDS = 1 << 18
"""The most token IDs that may be truncated, turned into text, or resumed in all outputs together."""
MAX_TOKENIZED_CHARACTERS = 1 << 18
"""The longest text that may be tokenized."""
MAX_RETURNED_TOKENS = 1 << 17
"""The most tokens of a tokenized text that are returned."""
MAX_LOGPROBS = 1 << 20
"""The most log probabilities of one response, alternatives included. They are some 20 MB in a message."""
MAX_CANCELLED = 1000
"""The most requests that one call cancels."""
