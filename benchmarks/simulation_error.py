"""How far the simulation is from real servers: the same random arrivals in both, with step times measured before.

python -m benchmarks.simulation_error --target localhost:50051,localhost:50052,localhost:50053

The servers should have no other load. Steps are timed on all servers at once, since servers on one machine slow each
other down.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

from benchmarks.simulate import LEAST, arrivals, capacity
from benchmarks.simulation import Request, simulate
from mpt_grpc_client import AsyncClient
from mpt_grpc_client.targets import resolve_targets

_PROMPT, _OUTPUT, _MAX_TOKENS = 160, 64, 1024
_STEPS = 60


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the servers, separated by commas")
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--requests", type=int, default=200, help="for each server")
    parsed = parser.parse_args()
    targets = resolve_targets(parsed.target)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncClient(targets))
        single = [await stack.enter_async_context(AsyncClient(target)) for target in targets]
        info = await client.get_server_info()
        print(f"| load | | {' | '.join(_COLUMNS)} |\n|---|---|{'---|' * len(_COLUMNS)}")
        for load in parsed.load:
            seconds = await _step_times(single)

            def serve(
                requests: list[Request], number: int, seconds: Callable[[int, int, int], float] = seconds
            ) -> None:
                simulate(requests, number, info.limits.max_cache_tokens, seconds, LEAST)

            rate = load * len(targets) * capacity(lambda requests, number, **_: serve(requests, number), _arrivals)
            requests = _arrivals(rate, parsed.requests * len(targets))
            await _replay(client, measured := [replace(request) for request in requests])
            serve(requests, len(targets))
            rows = {"measured": _row(measured), "simulated": _row(requests)}
            for name, row in rows.items():
                print(f"| {load:.0%} | {name} | {' | '.join(f'{1000 * value:.1f} ms' for value in row)} |")
            errors = (f"{ours / real - 1:+.0%}" for real, ours in zip(*rows.values(), strict=True))
            print(f"| {load:.0%} | error | {' | '.join(errors)} |", flush=True)


def _arrivals(rate: float, number: int) -> list[Request]:
    return arrivals(rate, number, _PROMPT, _OUTPUT, _MAX_TOKENS)


async def _step_times(clients: Sequence[AsyncClient]) -> Callable[[int, int, int], float]:
    """Returns the time of a step: linear in the outputs and in the tokens of prompts, as measured."""
    few, many = [await _mean(clients, number, 16, _STEPS) for number in (1, 12)]
    short, long = [await _mean(clients, 1, number, 1) for number in (32, 480)]
    per_output, per_token = (many - few) / 11, (long - short) / (480 - 32)
    base = few - per_output
    return lambda num_sequences, _, chunk: base + per_output * num_sequences + per_token * chunk


async def _mean(clients: Sequence[AsyncClient], num_streams: int, prompt: int, output: int) -> float:
    """Returns the median time between tokens, or to the only one, of `num_streams` streams on each server."""
    times: list[float] = []
    for _ in range(4):
        streams = [Request(0.0, prompt, output) for _ in range(num_streams * len(clients))]
        start_s = time.monotonic()
        await asyncio.gather(
            *(_run(clients[index % len(clients)], request, start_s) for index, request in enumerate(streams))
        )
        times += [_pace(request) if output > 1 else request.first_token_s for request in streams]
    return statistics.median(times)


async def _replay(client: AsyncClient, requests: Sequence[Request]) -> None:
    """Sends requests when they arrive, and notes their times."""
    start_s = time.monotonic()

    async def send(request: Request) -> None:
        await asyncio.sleep(request.arrival_s - (time.monotonic() - start_s))
        await _run(client, request, start_s)

    await asyncio.gather(*map(send, requests))


async def _run(client: AsyncClient, request: Request, start_s: float) -> None:
    prompt = random.choices(range(300, 4000), k=request.prompt_tokens)
    stream = client.stream(prompt, max_new_tokens=request.output_tokens, ignore_eos=True, cache_bypass=True)
    deltas = stream.deltas()
    await anext(deltas)
    request.first_token_s = time.monotonic() - start_s
    async for _ in deltas:
        pass
    request.end_s = time.monotonic() - start_s


_COLUMNS = ("first token, median", "first token, 95%", "per token, median", "per token, 95%")


def _row(requests: Sequence[Request]) -> tuple[float, float, float, float]:
    first = [request.first_token_s - request.arrival_s for request in requests]
    paces = [_pace(request) for request in requests if request.output_tokens > 8]
    return (
        statistics.median(first),
        statistics.quantiles(first, n=20)[-1],
        statistics.median(paces),
        statistics.quantiles(paces, n=20)[-1],
    )


def _pace(request: Request) -> float:
    return (request.end_s - request.first_token_s) / (request.output_tokens - 1)


if __name__ == "__main__":
    asyncio.run(main())
