"""Text completions: one or several prompts, with echo and log probabilities."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from fastapi import Request
from starlette.responses import Response

from mpt_grpc.gateway.errors import BadRequestError
from mpt_grpc.gateway.interleave import interleave
from mpt_grpc.gateway.requests import CompletionRequest
from mpt_grpc.gateway.responses import Json, PartedResponse, TextResponse, built, encoded, text_choice
from mpt_grpc.gateway.text_logprobs import TextLogprobs
from mpt_grpc_client import (
    AsyncClient,
    FieldViolation,
    GenerateOptions,
    Generation,
    InvalidRequestError,
    PreparedPrompt,
    QuotaExceededError,
    TokenLogprob,
    Usage,
)

_PROMPT_FIELDS = re.compile(r"^(prompt|token_ids)\b")
"""The client library's names of a prompt that is continued, and of one that is turned into text."""


def read_completion(
    request: Request, max_outputs: int, body: CompletionRequest
) -> tuple[CompletionRequest, list[PreparedPrompt]]:
    """Returns the body and the requests of its prompts, which takes the longer the longer these are.

    Raises BadRequestError or InvalidRequestError.
    """
    request.state.field_names = body.field_names
    body.check_num_outputs(max_outputs)
    if not body.stream:
        body.check_num_logprobs()
    options, requests = body.options(), list[PreparedPrompt]()
    for number, prompt in enumerate(body.prompts):
        with _naming_prompt(body, number):
            requests.append(PreparedPrompt(prompt, **_with_request_id(options, request.state.request_id, number)))
    return body, requests


async def complete(
    client: AsyncClient, body: CompletionRequest, requests: Sequence[PreparedPrompt], response: TextResponse
) -> Response:
    """Returns the response. If one of several prompts fails, all do. Raises MptGrpcError."""
    completing = [
        asyncio.ensure_future(_choices(client, body, prompt, request, number))
        for number, (prompt, request) in enumerate(zip(body.prompts, requests, strict=True))
    ]
    try:
        completed = await asyncio.gather(*completing)
    finally:
        for task in completing:
            task.cancel()
    choices = [choice for of_prompt, _ in completed for choice in of_prompt]
    content = response.complete(choices, [usage for _, usage in completed])
    return await asyncio.to_thread(PartedResponse, content) if body.logprobs is not None else PartedResponse(content)


async def _choices(
    client: AsyncClient, body: CompletionRequest, prompt: str | list[int], request: PreparedPrompt, number: int
) -> tuple[list[bytes], Usage]:
    """Returns the choices of the prompt with this number, and its usage.

    They are encoded as soon as they are complete: log probabilities take twenty times as much memory before.
    """
    with _naming_prompt(body, number):
        held = [await client.generate(request)]
        echo, first_token = await _echo(client, body, prompt, held[0])

    def build(generation: Generation) -> tuple[list[bytes], Usage]:
        choices = []
        for index, output in enumerate(generation.outputs, number * (body.n or 1)):
            logprobs = _logprobs(body, generation, output.logprobs, first_token)
            choices.append(encoded(text_choice(index, echo + output.text, logprobs, output.finish)))
        return choices, generation.usage

    return await built(build, held, has_logprobs=body.logprobs is not None)


async def _echo(
    client: AsyncClient, body: CompletionRequest, prompt: str | Sequence[int], generation: Generation
) -> tuple[str, _FirstToken]:
    """Returns the text of a prompt and its first token, which are empty unless the request asks for them."""
    if not body.echo:
        return "", _FirstToken(b"", 0)
    echo = await _text(client, prompt)
    text = await client.detokenize(generation.prompt_token_ids[:1], skip_special_tokens=False)
    num_bytes_after = sum(len(logprob.token_bytes) for logprob in generation.prompt_logprobs)
    return echo, _first_token(echo, text, num_bytes_after, is_truncated=body.truncate_prompt_tokens is not None)


class _FirstToken(NamedTuple):
    """The first token of a prompt, which has no log probability."""

    token_bytes: bytes
    start: int
    """Where it begins in the text of the prompt, which a truncated prompt is only a part of, in characters."""


def _first_token(echo: str, text: str, num_bytes_after: int, *, is_truncated: bool) -> _FirstToken:
    """Returns the first token, given its text and the number of bytes of all others."""
    before = echo.encode()[: max(0, len(echo.encode()) - num_bytes_after)]
    if is_truncated:
        token = text.encode()
        return _FirstToken(token, len(before[: max(0, len(before) - len(token))].decode(errors="ignore")))
    # Text lacks the bytes of a token that is only a part of a character.
    return _FirstToken(before if "\ufffd" in text and "\ufffd" not in echo else text.encode(), 0)


async def stream_completion(
    client: AsyncClient, body: CompletionRequest, requests: Sequence[PreparedPrompt], response: TextResponse
) -> AsyncIterator[Json]:
    """Yields the chunks of a response; those of several prompts are interleaved.

    Raises BadRequestError or MptGrpcError.
    """
    if body.echo and body.logprobs is not None:
        raise BadRequestError("echo: not supported with logprobs in a stream; set stream to false", "echo")
    usages: list[Usage] = []
    streams = [
        _stream_prompt(client, body, prompt, request, number, usages)
        for number, (prompt, request) in enumerate(zip(body.prompts, requests, strict=True))
    ]
    # A single stream is read directly, which costs less.
    async with contextlib.aclosing(interleave(streams) if len(streams) > 1 else streams[0]) as choices:
        async for choice in choices:
            yield response.chunk(choice)
    if body.includes_usage:
        yield response.usage_chunk(usages)


async def _stream_prompt(
    client: AsyncClient,
    body: CompletionRequest,
    prompt: str | Sequence[int],
    request: PreparedPrompt,
    number: int,
    usages: list[Usage],
) -> AsyncGenerator[Json]:
    """Yields the new parts of the choices of the prompt with this number, then appends its usage to `usages`."""
    first_index = number * (body.n or 1)
    with _naming_prompt(body, number):
        if body.echo:
            echo = await _text(client, prompt)
            for index in range(body.n or 1):
                yield text_choice(first_index + index, echo, None, None)
        of_outputs: defaultdict[int, TextLogprobs] = defaultdict(lambda: TextLogprobs(body.logprobs or 0))
        async with client.stream(request) as stream:
            async for delta in stream.deltas(keep_logprobs=False):
                logprobs = of_outputs[delta.index].add(delta.logprobs) if delta.logprobs else None
                if delta.text or logprobs or delta.finish:
                    yield text_choice(first_index + delta.index, delta.text, logprobs, delta.finish)
            usages.append(stream.result.usage)


@contextlib.contextmanager
def _naming_prompt(body: CompletionRequest, number: int) -> Iterator[None]:
    """Names the prompt with this number in errors about it, as the body contains it, and all if they are more than the
    caller may ever have in progress."""
    try:
        yield
    except QuotaExceededError as error:
        if error.quota != "requests" or error.limit >= len(body.prompts):
            raise
        why = f"{len(body.prompts)} prompts start at once; the quota allows {error.limit} in progress: send fewer"
        raise InvalidRequestError(why, violations=(FieldViolation("prompt", why),)) from error
    except InvalidRequestError as error:
        is_one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
        name = "prompt" if is_one else f"prompt[{number}]"
        violations = tuple(
            replace(violation, field=_PROMPT_FIELDS.sub(name, violation.field)) for violation in error.violations
        )
        raise InvalidRequestError(str(error), code=error.code, reason=error.reason, violations=violations) from error


def _with_request_id(options: GenerateOptions, request_id: str, number: int) -> GenerateOptions:
    """Returns the options of one prompt: the ID of the first is that of the response, the others add their number."""
    return {**options, "request_id": f"{request_id}-{number}" if number else request_id}


async def _text(client: AsyncClient, prompt: str | Sequence[int]) -> str:
    return prompt if isinstance(prompt, str) else await client.detokenize(prompt, skip_special_tokens=False)


def _logprobs(
    body: CompletionRequest, generation: Generation, output: Sequence[TokenLogprob], first_token: _FirstToken
) -> Json | None:
    if body.logprobs is None:
        return None
    if not body.echo:
        return TextLogprobs(body.logprobs).add(output)
    of_choice = TextLogprobs(body.logprobs, first_token.start)
    of_prompt, of_output = of_choice.add(generation.prompt_logprobs, first_token.token_bytes), of_choice.add(output)
    return {name: None if values is None else values + of_output[name] for name, values in of_prompt.items()}
