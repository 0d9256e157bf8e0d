"""Completions of OpenAI's older kind: text for text, one prompt or several, with echo and log probabilities."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from mpt_grpc.gateway.answers import TextAnswer, text_choice, text_logprobs
from mpt_grpc.gateway.errors import BadRequestError
from mpt_grpc.gateway.interleave import interleaved
from mpt_grpc.gateway.requests import CompletionRequest
from mpt_grpc_client import AsyncClient, GenerateOptions, Generation, TokenLogprob, Usage

Json = dict[str, Any]


async def complete(client: AsyncClient, asked: CompletionRequest, answer: TextAnswer, request_id: str | None) -> Json:
    """The whole answer. If one prompt of several fails, all do. Raises MptGrpcError."""
    prompts, options = asked.prompts, asked.options()
    calls = [
        asyncio.ensure_future(client.generate(prompt, **_named(options, request_id, number)))
        for number, prompt in enumerate(prompts)
    ]
    try:
        generations = await asyncio.gather(*calls)
    finally:
        for call in calls:
            call.cancel()
    choices: list[Json] = []
    for prompt, generation in zip(prompts, generations, strict=True):
        echo = await _text(client, prompt) if asked.echo else ""
        first = await client.detokenize(generation.prompt_token_ids[:1]) if asked.echo else ""
        for output in generation.outputs:
            logprobs = _logprobs(asked, generation, output.logprobs, echo, first)
            choices.append(text_choice(len(choices), echo + output.text, logprobs, output.finish))
    return answer.whole(choices, [generation.usage for generation in generations])


async def stream_completion(
    client: AsyncClient, asked: CompletionRequest, answer: TextAnswer, request_id: str | None
) -> AsyncIterator[Json]:
    """The chunks of an answer; those of several prompts interleave. Raises MptGrpcError."""
    if asked.echo and asked.logprobs is not None:
        raise BadRequestError("echo with logprobs is not supported in a stream: send stream false", "echo")
    usages: list[Usage] = []
    streams = [
        _stream_prompt(client, asked, prompt, _named(asked.options(), request_id, number), number, usages)
        for number, prompt in enumerate(asked.prompts)
    ]
    # One alone is read as it is, which costs less.
    async with contextlib.aclosing(interleaved(streams) if len(streams) > 1 else streams[0]) as choices:
        async for choice in choices:
            yield answer.chunk(choice)
    if asked.includes_usage:
        yield answer.usage_chunk(usages)


async def _stream_prompt(
    client: AsyncClient,
    asked: CompletionRequest,
    prompt: str | Sequence[int],
    options: GenerateOptions,
    number: int,
    usages: list[Usage],
) -> AsyncGenerator[Json]:
    """The choices of the prompt of this number, as they grow; its usage goes to `usages`."""
    first_index = number * (asked.n or 1)
    if asked.echo:
        echo = await _text(client, prompt)
        for index in range(asked.n or 1):
            yield text_choice(first_index + index, echo, None, None)
    offsets: defaultdict[int, int] = defaultdict(int)
    async with client.stream(prompt, **options) as stream:
        async for delta in stream.deltas():
            logprobs = None
            if delta.logprobs:
                logprobs = text_logprobs(delta.logprobs, offsets[delta.index], asked.logprobs or 0)
            offsets[delta.index] += len(delta.text)
            if delta.text or logprobs or delta.finish:
                yield text_choice(first_index + delta.index, delta.text, logprobs, delta.finish)
        usages.append(stream.result.usage)


def _named(options: GenerateOptions, request_id: str | None, number: int) -> GenerateOptions:
    """The options of one prompt; the caller's request id names the first, others have its number behind it."""
    if request_id is None:
        return options
    return {**options, "request_id": f"{request_id}-{number}" if number else request_id}


async def _text(client: AsyncClient, prompt: str | Sequence[int]) -> str:
    return prompt if isinstance(prompt, str) else await client.detokenize(prompt, skip_special_tokens=False)


def _logprobs(
    asked: CompletionRequest, generation: Generation, output: Sequence[TokenLogprob], echo: str, first: str
) -> Json | None:
    if asked.logprobs is None:
        return None
    after = text_logprobs(output, len(echo), asked.logprobs)
    if not asked.echo:
        return after
    before = text_logprobs(generation.prompt_logprobs, 0, asked.logprobs, first)
    return {name: None if values is None else values + after[name] for name, values in before.items()}
