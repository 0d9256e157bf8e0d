"""Text completions: one or several prompts, with echo and log probabilities."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response

from mpt_grpc.gateway.errors import BadRequestError
from mpt_grpc.gateway.interleave import interleave
from mpt_grpc.gateway.requests import CompletionRequest
from mpt_grpc.gateway.responses import TextResponse, rendered, text_choice, text_logprobs
from mpt_grpc_client import AsyncClient, GenerateOptions, Generation, TokenLogprob, Usage

Json = dict[str, Any]


async def complete(client: AsyncClient, body: CompletionRequest, response: TextResponse, request_id: str) -> Response:
    """Returns the complete response. If one of several prompts fails, all do. Raises MptGrpcError."""
    prompts, options = body.prompts, body.options()
    calls = [
        asyncio.ensure_future(client.generate(prompt, **_with_request_id(options, request_id, number)))
        for number, prompt in enumerate(prompts)
    ]
    try:
        generations = await asyncio.gather(*calls)
    finally:
        for call in calls:
            call.cancel()
    echoes = [await _echo(client, body, *pair) for pair in zip(prompts, generations, strict=True)]

    def build() -> Json:
        choices: list[Json] = []
        for generation, (echo, first_token) in zip(generations, echoes, strict=True):
            for output in generation.outputs:
                logprobs = _logprobs(body, generation, output.logprobs, echo, first_token)
                choices.append(text_choice(len(choices), echo + output.text, logprobs, output.finish))
        return response.complete(choices, [generation.usage for generation in generations])

    return await rendered(build, has_logprobs=body.logprobs is not None)


async def _echo(
    client: AsyncClient, body: CompletionRequest, prompt: str | Sequence[int], generation: Generation
) -> tuple[str, str]:
    """Returns the text of a prompt and of its first token, which are empty unless the request asks for them."""
    if not body.echo:
        return "", ""
    return await _text(client, prompt), await client.detokenize(generation.prompt_token_ids[:1])


async def stream_completion(
    client: AsyncClient, body: CompletionRequest, response: TextResponse, request_id: str
) -> AsyncIterator[Json]:
    """Yields the chunks of a response; those of several prompts are interleaved. Raises MptGrpcError."""
    if body.echo and body.logprobs is not None:
        raise BadRequestError("echo: not supported with logprobs in a stream; set stream to false", "echo")
    usages: list[Usage] = []
    streams = [
        _stream_prompt(client, body, prompt, _with_request_id(body.options(), request_id, number), number, usages)
        for number, prompt in enumerate(body.prompts)
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
    options: GenerateOptions,
    number: int,
    usages: list[Usage],
) -> AsyncGenerator[Json]:
    """Yields the new parts of the choices of the prompt with this number, then appends its usage to `usages`."""
    first_index = number * (body.n or 1)
    if body.echo:
        echo = await _text(client, prompt)
        for index in range(body.n or 1):
            yield text_choice(first_index + index, echo, None, None)
    offsets: defaultdict[int, int] = defaultdict(int)
    async with client.stream(prompt, **options) as stream:
        async for delta in stream.deltas():
            logprobs = None
            if delta.logprobs:
                logprobs = text_logprobs(delta.logprobs, offsets[delta.index], body.logprobs or 0)
            offsets[delta.index] += len(delta.text)
            if delta.text or logprobs or delta.finish:
                yield text_choice(first_index + delta.index, delta.text, logprobs, delta.finish)
        usages.append(stream.result.usage)


def _with_request_id(options: GenerateOptions, request_id: str, number: int) -> GenerateOptions:
    """Returns the options of one prompt: the ID of the first is that of the response, the others add their number."""
    return {**options, "request_id": f"{request_id}-{number}" if number else request_id}


async def _text(client: AsyncClient, prompt: str | Sequence[int]) -> str:
    return prompt if isinstance(prompt, str) else await client.detokenize(prompt, skip_special_tokens=False)


def _logprobs(
    body: CompletionRequest, generation: Generation, output: Sequence[TokenLogprob], echo: str, first_token: str
) -> Json | None:
    if body.logprobs is None:
        return None
    of_output = text_logprobs(output, len(echo), body.logprobs)
    if not body.echo:
        return of_output
    of_prompt = text_logprobs(generation.prompt_logprobs, 0, body.logprobs, first_token)
    return {name: None if values is None else values + of_output[name] for name, values in of_prompt.items()}
