"""Validates requests: the range of every field, and whether prompt and output fit in the context and the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from ctypes import c_float
from dataclasses import dataclass

from mpt_grpc.constraint import JsonObject, JsonSchema
from mpt_grpc.conversation import Conversation
from mpt_grpc.errors import CONTEXT_LENGTH_EXCEEDED, FieldViolation
from mpt_grpc.limits import MAX_BYTES, MAX_COUNTS, MAX_LOGPROBS, RANGES
from mpt_grpc.request import (
    ChunkOptions,
    DecodingOptions,
    GenerationRequest,
    LogprobOptions,
    SamplingParameters,
    StoppingCriteria,
)


@dataclass(frozen=True)
class RequestLimits:
    """The limits that a request is checked against."""

    vocab_size: int
    """The number of token IDs in the tokenizer's vocabulary."""
    max_context_tokens: int
    """The maximum length of prompt and output together; never more than fits in the KV cache."""
    default_max_new_tokens: int
    """The value for requests that do not set `max_new_tokens`, reduced to the room in the context."""
    max_num_sequences: int
    """The maximum number of outputs per request; never more than may be in progress at once."""
    max_token_bytes: int
    """The number of bytes of the longest token."""

    @property
    def max_prompt_bytes(self) -> int:
        """The size of the longest text that can fit in the context."""
        return self.max_context_tokens * self.max_token_bytes


def num_sequences_violations(sampling: SamplingParameters, limits: RequestLimits) -> Iterator[FieldViolation]:
    """Yields a violation if a request cannot take as many places as it has outputs."""
    if not 1 <= sampling.num_sequences <= limits.max_num_sequences:
        why = f"{sampling.num_sequences} is not in [1, {limits.max_num_sequences}]"
        yield FieldViolation("sampling.num_sequences", why)


def request_violations(request: GenerationRequest, limits: RequestLimits) -> Iterator[FieldViolation]:
    """Yields the violations that do not depend on the prompt's tokens."""
    yield from _text("request_id", request.request_id)
    yield from _text("cache.salt", request.cache.salt)
    yield from _number("priority", request.priority)
    if request.truncate_prompt_tokens is not None:
        if isinstance(request.prompt, Conversation):
            why = "cannot be combined with a conversation: set its drop_oldest_turns instead"
            yield FieldViolation("truncate_prompt_tokens", why)
        if request.truncate_prompt_tokens < 1:
            yield FieldViolation("truncate_prompt_tokens", f"{request.truncate_prompt_tokens} is below 1")
    yield from _sampling(request.sampling, limits)
    yield from _decoding(request.decoding, limits)
    yield from _stopping(request.stopping, limits)
    yield from _logprobs(request.logprobs)
    yield from _chunks(request.chunks)
    yield from _combinations(request, limits)


def prompt_violations(
    request: GenerationRequest, prompt_token_ids: tuple[int, ...], limits: RequestLimits
) -> Iterator[FieldViolation]:
    """Yields the violations that depend on the prompt's tokens: invalid IDs, and requests that exceed the context."""
    field = "text" if isinstance(request.prompt, str) else "token_ids.ids"
    num_tokens, context = len(prompt_token_ids), limits.max_context_tokens
    max_new_tokens = request.stopping.max_new_tokens
    if not prompt_token_ids:
        yield FieldViolation("prompt", "empty: pass text, token IDs or messages, with at least one token")
        return
    if num_tokens > context - (max_new_tokens != 0):
        why = f"{num_tokens} tokens leave no room for a new token in the context of {context}: shorten the prompt"
        yield FieldViolation(field, why, CONTEXT_LENGTH_EXCEEDED)
        return
    if isinstance(request.prompt, tuple):
        yield from _token_ids(field, prompt_token_ids, limits, len(request.prompt) - num_tokens)
    for resumed_field, resumed in resumed_lists(request):
        if num_tokens + len(resumed) > context:
            why = f"{len(resumed)} tokens after a prompt of {num_tokens} exceed the context of {context}"
            yield FieldViolation(resumed_field, why, CONTEXT_LENGTH_EXCEEDED)
    if max_new_tokens is not None and num_tokens + max_new_tokens > context:
        yield FieldViolation(
            "stopping.max_new_tokens",
            f"{max_new_tokens} new tokens after a prompt of {num_tokens} exceed the context of {context}:"
            f" request at most {context - num_tokens} or shorten the prompt",
            CONTEXT_LENGTH_EXCEEDED,
        )
        return
    yield from _num_logprobs(request, num_tokens, limits)


def _sampling(sampling: SamplingParameters, limits: RequestLimits) -> Iterator[FieldViolation]:
    for name in ("temperature", "top_p", "min_p", "typical_p"):
        yield from _number(f"sampling.{name}", getattr(sampling, name))
    if not 0 <= sampling.top_k <= limits.vocab_size:
        yield FieldViolation("sampling.top_k", f"{sampling.top_k} is not in [0, {limits.vocab_size}]")
    if sampling.seed is not None and not 0 <= sampling.seed < 1 << 64:
        yield FieldViolation("sampling.seed", f"{sampling.seed} is not in [0, 2^64)")
    yield from num_sequences_violations(sampling, limits)


def _decoding(decoding: DecodingOptions, limits: RequestLimits) -> Iterator[FieldViolation]:
    for name in ("repetition_penalty", "frequency_penalty", "presence_penalty"):
        yield from _number(f"decoding.{name}", getattr(decoding, name))
    yield from _count("decoding.logit_bias", len(decoding.logit_bias))
    for token, bias in decoding.logit_bias.items():
        field = f"decoding.logit_bias[{token}]"
        if not 0 <= token < limits.vocab_size:
            yield FieldViolation(field, f"{token} is not a token ID: IDs are below {limits.vocab_size}")
        yield from _number("decoding.logit_bias", bias, field)
    if len(decoding.allowed_token_ids) > limits.vocab_size:
        why = f"{len(decoding.allowed_token_ids)} items; at most {limits.vocab_size} are allowed"
        yield FieldViolation("decoding.allowed_token_ids", why)
    yield from _token_ids("decoding.allowed_token_ids", decoding.allowed_token_ids, limits)
    if isinstance(decoding.constraint, JsonSchema | JsonObject) and decoding.constraint.max_whitespace is not None:
        yield from _number("decoding.max_whitespace", decoding.constraint.max_whitespace)


def _stopping(stopping: StoppingCriteria, limits: RequestLimits) -> Iterator[FieldViolation]:
    if stopping.max_new_tokens is not None and stopping.max_new_tokens < 0:
        yield FieldViolation("stopping.max_new_tokens", f"{stopping.max_new_tokens} is below 0")
    yield from _count("stopping.stop_strings", len(stopping.stop_strings))
    for index, stop in enumerate(stopping.stop_strings):
        size, most = len(stop.encode()), MAX_BYTES["stopping.stop_strings"]
        if not 1 <= size <= most:
            why = f"its length, {size} bytes, is not in [1, {most}]"
            yield FieldViolation(f"stopping.stop_strings[{index}]", why)
    yield from _count("stopping.stop_token_ids", len(stopping.stop_token_ids))
    yield from _token_ids("stopping.stop_token_ids", stopping.stop_token_ids, limits)
    limit_s = stopping.time_limit_s
    if limit_s is not None and not 0 < limit_s < math.inf:
        yield FieldViolation("stopping.time_limit", f"{limit_s} s is not positive and finite")
    if (guard := stopping.repetition_guard) is not None:
        for name in ("min_repeats", "max_cycle_tokens"):
            yield from _number(f"stopping.repetition_guard.{name}", getattr(guard, name))


def _chunks(chunks: ChunkOptions) -> Iterator[FieldViolation]:
    if chunks.num_tokens is not None:
        yield from _number("output_options.chunk_tokens", chunks.num_tokens)
    if chunks.interval_s is not None and not 0 < chunks.interval_s < math.inf:
        yield FieldViolation("output_options.chunk_interval", f"{chunks.interval_s} s is not positive and finite")


def _logprobs(logprobs: LogprobOptions) -> Iterator[FieldViolation]:
    yield from _number("output_options.top_logprobs", logprobs.num_top)
    if logprobs.num_top and not (logprobs.prompt or logprobs.output):
        yield FieldViolation("output_options.top_logprobs", "requires return_logprobs or return_prompt_logprobs")


def _num_logprobs(
    request: GenerationRequest, num_prompt_tokens: int, limits: RequestLimits
) -> Iterator[FieldViolation]:
    """Yields a violation if the response may have too many log probabilities to be returned."""
    logprobs, most = request.logprobs, request.stopping.max_new_tokens
    if most is None:
        most = min(limits.default_max_new_tokens, limits.max_context_tokens - num_prompt_tokens)
    num_tokens = num_prompt_tokens * logprobs.prompt + most * request.sampling.num_sequences * logprobs.output
    if (count := num_tokens * (1 + logprobs.num_top)) > MAX_LOGPROBS:
        why = f"up to {num_tokens} tokens would have {count} log probabilities with their alternatives"
        yield FieldViolation(
            "output_options.top_logprobs", f"{why}; at most {MAX_LOGPROBS} are returned: request fewer, or fewer tokens"
        )


def _combinations(request: GenerationRequest, limits: RequestLimits) -> Iterator[FieldViolation]:
    """Yields the violations of fields that cannot be combined."""
    sampling, decoding, stopping = request.sampling, request.decoding, request.stopping
    max_new_tokens = limits.default_max_new_tokens if stopping.max_new_tokens is None else stopping.max_new_tokens
    if not 0 <= stopping.min_new_tokens <= max_new_tokens:
        bounds = f"[0, {max_new_tokens}], where the upper bound is the limit of new tokens"
        yield FieldViolation("stopping.min_new_tokens", f"{stopping.min_new_tokens} is not in {bounds}")
    if request.constraint is not None and decoding.allowed_token_ids:
        why = "cannot be combined with a constraint or tools: the two might have no token in common"
        yield FieldViolation("decoding.allowed_token_ids", why)
    if request.constraint is not None and stopping.ignore_eos:
        why = "cannot be combined with a constraint or tools: the output ends once the constraint is complete"
        yield FieldViolation("stopping.ignore_eos", why)
    if max_new_tokens == 0 and sampling.num_sequences > 1:
        yield FieldViolation("sampling.num_sequences", "must be 1 if the limit of new tokens is 0: there is no output")
    yield from _resumed(request, max_new_tokens, limits)


def resumed_lists(request: GenerationRequest) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the lists of tokens to resume, each after its path in the API."""
    if request.resume_token_ids:
        yield "resume_token_ids", request.resume_token_ids
    for number, output in enumerate(request.resume_outputs):
        yield f"resume_outputs[{number}].token_ids", output.token_ids


def _resumed(request: GenerationRequest, max_new_tokens: int, limits: RequestLimits) -> Iterator[FieldViolation]:
    sampling, outputs = request.sampling, request.resume_outputs
    if request.resume_token_ids and sampling.num_sequences > 1:
        why = "cannot be combined with num_sequences above 1: use resume_outputs"
        yield FieldViolation("resume_token_ids", why)
    if request.resume_token_ids and outputs:
        yield FieldViolation("resume_token_ids", "cannot be combined with resume_outputs, which has the same meaning")
    for number, output in enumerate(outputs):
        if not 0 <= output.index < sampling.num_sequences:
            why = f"{output.index} is not in [0, {sampling.num_sequences}), which num_sequences determines"
            yield FieldViolation(f"resume_outputs[{number}].index", why)
    if len({output.index for output in outputs}) < len(outputs):
        yield FieldViolation("resume_outputs", "an index occurs twice")
    if (request.resume_token_ids or outputs) and sampling.seed is None and sampling.temperature > 0:
        why = "required to resume an output unless temperature is 0: set the seed from the interrupted response"
        yield FieldViolation("sampling.seed", why)
    for field, resumed in resumed_lists(request):
        if len(resumed) > max_new_tokens:
            why = f"{len(resumed)} tokens exceed max_new_tokens, which is {max_new_tokens}"
            yield FieldViolation(field, why)
        yield from _token_ids(field, resumed, limits)


def _token_ids(
    field: str, token_ids: Iterable[int], limits: RequestLimits, first_index: int = 0
) -> Iterator[FieldViolation]:
    """Yields a violation for the first invalid token ID of those that begin at `first_index` of the field."""
    for index, token in enumerate(token_ids, first_index):
        if not 0 <= token < limits.vocab_size:
            yield FieldViolation(f"{field}[{index}]", f"{token} is not a token ID: IDs are below {limits.vocab_size}")
            return


def _number(field: str, value: float, item: str | None = None) -> Iterator[FieldViolation]:
    """Yields a violation if the value is out of the field's range; `item` names the part of the field that it is."""
    if value not in RANGES[field]:
        yield FieldViolation(item or field, f"{_as_sent(value)} is not in {RANGES[field]}")


def _count(field: str, count: int) -> Iterator[FieldViolation]:
    if count > MAX_COUNTS[field]:
        yield FieldViolation(field, f"{count} items; at most {MAX_COUNTS[field]} are allowed")


def _text(field: str, text: str) -> Iterator[FieldViolation]:
    if len(text.encode()) > MAX_BYTES[field]:
        yield FieldViolation(field, f"longer than {MAX_BYTES[field]} bytes")


def _as_sent(value: float) -> str:
    """Returns a number as its caller wrote it: the API's floats have 32 bits, of which this is the shortest decimal."""
    if isinstance(value, int):
        return str(value)
    decimals = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return str(next((decimal for decimal in decimals if c_float(decimal).value == value), value))
