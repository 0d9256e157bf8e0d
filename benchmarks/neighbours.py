"""Measures what else goes on at a server: a busy process on its cores, a long prompt beside streams, and a prompt whose
beginning is in the prefix cache.

    python -m benchmarks.neighbours --model FOLDER
    python -m benchmarks.neighbours --model FOLDER --quantize int8

Prompts are random tokens; all other flags are those of the server, a process of its own. `make bench` leaves a model in
build/bench/.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from random import Random
from statistics import median, quantiles
from time import perf_counter
from typing import TypeVar

from benchmarks.peers.drivers.ladder import Generation, decode_rate
from benchmarks.peers.drivers.ours import served, streams
from mpt_grpc_client import AsyncClient

_Result = TypeVar("_Result")
_BUSY = "while True: pass"
_random = Random(0)


async def main(target: str) -> None:
    async with AsyncClient(target, timeout=600) as client:
        await _streams(client, 8, 16)  # warms the server up
        await _beside_a_busy_process(client)
        await _beside_a_long_prompt(client)
        await _after_the_same_beginning(client)


async def _beside_a_busy_process(client: AsyncClient) -> None:
    """4 streams alone, beside a process that computes all the time, and alone again."""
    quiet = await _streams(client, 4, 128)
    busy = await asyncio.create_subprocess_exec(sys.executable, "-c", _BUSY)
    try:
        disturbed = await _streams(client, 4, 256)
    finally:
        busy.kill()
        await busy.wait()
    again = await _streams(client, 4, 128)
    rates = [decode_rate(generation) for generation in (quiet, disturbed, again)]
    gaps = _gaps_s(disturbed)
    print(f"4 streams: {rates[0]:.1f} and {rates[2]:.1f} tokens/s; beside a busy process {rates[1]:.1f},", end=" ")
    print(f"{2 * rates[1] / (rates[0] + rates[2]):.2f} of it; longest step {max(gaps) / median(gaps):.1f} x the median")


async def _beside_a_long_prompt(client: AsyncClient, prompt_tokens: int = 2000) -> None:
    """8 streams alone, and while one prompt after the other is computed."""
    alone = _gaps_s(await _streams(client, 8, 200))
    first_token_s = []

    async def prompts() -> None:
        while True:
            first_token_s.append(await _first_token_s(client, _tokens(prompt_tokens)))

    disturbed = _gaps_s(await _beside(prompts, _streams(client, 8, 400)))
    print(f"8 streams: {_percentiles_ms(alone)}; beside prompts of {prompt_tokens:,} tokens:", end=" ")
    print(f"{_percentiles_ms(disturbed)}, {_p99(disturbed) / _p99(alone):.2f} x the p99;", end=" ")
    print(f"a prompt takes {median(first_token_s):.1f} s" if first_token_s else "no prompt was done")


async def _after_the_same_beginning(client: AsyncClient, shared_tokens: int = 1500, new_tokens: int = 40) -> None:
    """The second turns of chats: prompts whose beginning was that of a request before."""
    first, second = [], []
    for _ in range(3):
        beginning = _tokens(shared_tokens)
        first.append(await _first_token_s(client, beginning))
        second.append(await _first_token_s(client, [*beginning, *_tokens(new_tokens)]))
    ratio = median(first) / median(second)
    print(f"first token after {shared_tokens:,} new tokens: {median(first) * 1e3:.0f} ms; after the same and", end=" ")
    print(f"{new_tokens} more: {median(second) * 1e3:.0f} ms, {ratio:.1f} times as fast")


async def _streams(client: AsyncClient, number: int, new_tokens: int) -> Generation:
    return await streams(client, [_tokens(64) for _ in range(number)], new_tokens)


async def _first_token_s(client: AsyncClient, prompt: Sequence[int]) -> float:
    start_s = perf_counter()
    await client.generate(prompt, temperature=0, max_new_tokens=1, ignore_eos=True)
    return perf_counter() - start_s


async def _beside(other: Callable[[], Awaitable[None]], measured: Awaitable[_Result]) -> _Result:
    """Returns the result of what is measured, while something else goes on."""
    task = asyncio.ensure_future(other())
    try:
        return await measured
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _gaps_s(generation: Generation) -> list[float]:
    """Returns the times between the tokens of each stream."""
    return [after - before for times in generation.token_times_s for before, after in pairwise(times)]


def _percentiles_ms(gaps_s: Sequence[float]) -> str:
    return f"{median(gaps_s) * 1e3:.0f} ms a token, p99 {_p99(gaps_s) * 1e3:.0f} ms"


def _p99(gaps_s: Sequence[float]) -> float:
    return quantiles(gaps_s, n=100)[98]


def _tokens(number: int) -> list[int]:
    return _random.choices(range(1, 1000), k=number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Prints what a busy process, long prompts and the prefix cache change."
    )
    parser.add_argument("--model", required=True, help="the folder of a checkpoint")
    arguments, flags = parser.parse_known_args()
    with served("--model", arguments.model, *flags) as address:
        asyncio.run(main(address))
