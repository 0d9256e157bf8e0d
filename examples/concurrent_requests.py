"""Sends several requests at once. The server computes them in one batch, so they take little longer than one."""

import asyncio
import time

from mpt_grpc_client import AsyncClient

PROMPTS = (
    "The fox",
    "The old king",
    "It was snowing.",
    "A ship",
    "The princess",
    "One morning",
    "The bear",
    "Far away",
)


async def main() -> None:
    async with AsyncClient(timeout=60) as client:
        start = time.monotonic()
        results = await asyncio.gather(*(client.generate(prompt, max_new_tokens=30, seed=1) for prompt in PROMPTS))
        for prompt, result in zip(PROMPTS, results, strict=True):
            print(f"{prompt}{result.text}".replace("\n", " "))
        num_tokens = sum(result.num_tokens for result in results)
        print(f"{num_tokens} tokens in {time.monotonic() - start:.1f} s")


asyncio.run(main())
