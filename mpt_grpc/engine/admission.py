"""Decides whether a request may enter: every field within its range, and room for it in the context and the cache."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mpt_grpc.errors import FieldViolation, InvalidRequestError
from mpt_grpc.request import GenerationRequest, SamplingParameters, StoppingCriteria

DEFAULT_MAX_NEW_TOKENS = 256
MAX_ID_BYTES = 128
MAX_STOP_STRINGS, MAX_STOP_STRING_BYTES = 16, 256
MAX_STOP_TOKEN_IDS = 64
MAX_PRIORITY = 100


@dataclass(frozen=True)
class RequestLimits:
    """What a request must fit in."""

    vocab_size: int
    """Tokens of the tokenizer."""
    max_context_tokens: int
    """Prompt and output together; never more than the KV cache holds."""


def admit(request: GenerationRequest, prompt_token_ids: tuple[int, ...], limits: RequestLimits) -> GenerationRequest:
    """Returns the request with its seed and `max_new_tokens` resolved.

    Raises InvalidRequestError with all the fields that are out of range.
    """
    violations = tuple(_violations(request, prompt_token_ids, limits))
    if violations:
        raise InvalidRequestError(*violations)
    sampling, stopping = request.sampling, request.stopping
    if sampling.seed is None:
        sampling = replace(sampling, seed=secrets.randbits(64))
    if stopping.max_new_tokens is None:
        stopping = replace(stopping, max_new_tokens=DEFAULT_MAX_NEW_TOKENS)
    return replace(request, sampling=sampling, stopping=stopping)


def check_text_length(text: str, max_token_bytes: int, limits: RequestLimits) -> None:
    """Raises InvalidRequestError for a text that cannot fit, before time is spent on tokenizing it."""
    longest = limits.max_context_tokens * max_token_bytes
    if len(text) > longest:
        why = f"{len(text)} characters cannot fit in the context of {limits.max_context_tokens} tokens"
        raise InvalidRequestError(FieldViolation("text", f"{why}: shorten the prompt"))


def _violations(
    request: GenerationRequest, prompt_token_ids: tuple[int, ...], limits: RequestLimits
) -> Iterator[FieldViolation]:
    if len(request.request_id.encode()) > MAX_ID_BYTES:
        yield FieldViolation("request_id", f"longer than {MAX_ID_BYTES} bytes")
    if len(request.cache.salt.encode()) > MAX_ID_BYTES:
        yield FieldViolation("cache.salt", f"longer than {MAX_ID_BYTES} bytes")
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        yield FieldViolation("priority", f"{request.priority} is not in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    yield from _prompt(request, prompt_token_ids, limits)
    yield from _sampling(request.sampling, limits)
    yield from _stopping(request.stopping, limits)


def _prompt(
    request: GenerationRequest, prompt_token_ids: tuple[int, ...], limits: RequestLimits
) -> Iterator[FieldViolation]:
    field = "text" if isinstance(request.prompt, str) else "token_ids.ids"
    num_tokens, context = len(prompt_token_ids), limits.max_context_tokens
    if not prompt_token_ids:
        yield FieldViolation("prompt", "empty: set text or token_ids, with at least one token")
        return
    if num_tokens >= context:
        yield FieldViolation(
            field, f"{num_tokens} tokens leave no room for a new one in the context of {context}: shorten the prompt"
        )
        return
    for index, token in enumerate(prompt_token_ids):
        if not 0 <= token < limits.vocab_size:
            yield FieldViolation(f"{field}[{index}]", f"{token} is not a token id: they are below {limits.vocab_size}")
            break
    max_new_tokens = request.stopping.max_new_tokens
    if max_new_tokens is not None and num_tokens + max_new_tokens > context:
        yield FieldViolation(
            "stopping.max_new_tokens",
            f"{max_new_tokens} new tokens after a prompt of {num_tokens} exceed the context of {context}:"
            f" ask for at most {context - num_tokens} or shorten the prompt",
        )


def _sampling(sampling: SamplingParameters, limits: RequestLimits) -> Iterator[FieldViolation]:
    # Each comparison is false for NaN, so that NaN is out of every range.
    if not 0 <= sampling.temperature <= 100:
        yield FieldViolation("sampling.temperature", f"{sampling.temperature} is not in [0, 100]")
    if not 0 <= sampling.top_k <= limits.vocab_size:
        yield FieldViolation("sampling.top_k", f"{sampling.top_k} is not in [0, {limits.vocab_size}]")
    if not 0 < sampling.top_p <= 1:
        yield FieldViolation("sampling.top_p", f"{sampling.top_p} is not in (0, 1]; 1 keeps all tokens")
    if not 0 <= sampling.min_p <= 1:
        yield FieldViolation("sampling.min_p", f"{sampling.min_p} is not in [0, 1]")
    if sampling.seed is not None and not 0 <= sampling.seed < 1 << 64:
        yield FieldViolation("sampling.seed", f"{sampling.seed} is not in [0, 2^64)")


def _stopping(stopping: StoppingCriteria, limits: RequestLimits) -> Iterator[FieldViolation]:
    if stopping.max_new_tokens is not None and stopping.max_new_tokens < 1:
        yield FieldViolation("stopping.max_new_tokens", f"{stopping.max_new_tokens} is below 1")
    if len(stopping.stop_strings) > MAX_STOP_STRINGS:
        yield FieldViolation("stopping.stop_strings", f"{len(stopping.stop_strings)}, at most {MAX_STOP_STRINGS}")
    for index, stop in enumerate(stopping.stop_strings):
        if not 1 <= len(stop.encode()) <= MAX_STOP_STRING_BYTES:
            yield FieldViolation(
                f"stopping.stop_strings[{index}]",
                f"{len(stop.encode())} bytes are not in [1, {MAX_STOP_STRING_BYTES}]",
            )
    if len(stopping.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        yield FieldViolation("stopping.stop_token_ids", f"{len(stopping.stop_token_ids)}, at most {MAX_STOP_TOKEN_IDS}")
    for index, token in enumerate(stopping.stop_token_ids):
        if not 0 <= token < limits.vocab_size:
            yield FieldViolation(
                f"stopping.stop_token_ids[{index}]", f"{token} is not a token id: they are below {limits.vocab_size}"
            )
