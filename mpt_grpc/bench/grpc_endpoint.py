"""A server of this project over gRPC, whose messages carry their number of tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from time import perf_counter
from typing import Unpack

from mpt_grpc.bench.endpoint import Answer, Prompt, RequestFailedError
from mpt_grpc_client import AsyncClient, ConnectionOptions, ModelInfo, MptGrpcError


class GrpcEndpoint:
    """Prompts are random token IDs."""

    prompts = "token IDs"

    def __init__(self, client: AsyncClient, model: ModelInfo) -> None:
        self._client = client
        self.model, self.max_context_tokens = model.name, model.max_context_tokens
        self._token_ids = sorted(set(range(model.vocab_size)) - set(model.eos_token_ids))

    def prompt(self, num_tokens: int, random: Random) -> Prompt:
        return random.choices(self._token_ids, k=num_tokens)

    async def send(self, prompt: Prompt, num_output_tokens: int) -> Answer:
        times_s, counts = [], []
        try:
            async with self._client.stream(prompt, max_new_tokens=num_output_tokens, ignore_eos=True) as stream:
                async for delta in stream.deltas():
                    if delta.num_tokens:
                        times_s.append(perf_counter())
                        counts.append(delta.num_tokens)
                usage = stream.result.usage
        except MptGrpcError as error:
            raise RequestFailedError(error.code.name, str(error)) from error
        return Answer(tuple(times_s), tuple(counts), usage.num_prompt_tokens, usage.num_output_tokens)


@asynccontextmanager
async def open_grpc(target: str | None, **connection: Unpack[ConnectionOptions]) -> AsyncIterator[GrpcEndpoint]:
    """Connects to a server, without retries, which would hide refusals. Raises MptGrpcError."""
    async with AsyncClient(target, retries=False, **connection) as client:
        yield GrpcEndpoint(client, await client.get_model_info())
