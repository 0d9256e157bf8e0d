"""Measures the overhead of the OpenAI-compatible API: the same streams over gRPC and HTTP in turn, on one server.

mpt-grpc serve &
python benchmarks/gateway_overhead.py
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable

import aiohttp

from mpt_grpc_client import AsyncClient

PROMPT, NUM_TOKENS, ROUNDS = "Once upon a time", 200, 5
Stream = Callable[[], AsyncIterator[None]]


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="localhost:50051")
    parser.add_argument("--url", default="http://localhost:8451/v1")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parsed = parser.parse_args()
    print(
        "| streams | protocol | tokens/s | TTFT ms, median | ITL ms, median | ITL ms, p99 |\n|---|---|---|---|---|---|"
    )
    async with AsyncClient(parsed.target) as client, aiohttp.ClientSession() as session:

        async def grpc() -> AsyncIterator[None]:
            async with client.stream(PROMPT, max_new_tokens=NUM_TOKENS, ignore_eos=True) as stream:
                async for _ in stream.deltas():
                    yield

        async def http() -> AsyncIterator[None]:
            body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
            async with session.post(f"{parsed.url}/completions", json=body) as response:
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        yield

        for num_streams in parsed.streams:
            rounds: dict[str, list[tuple[float, ...]]] = {"gRPC": [], "HTTP": []}
            for number in range(ROUNDS + 1):
                for name, stream in (("gRPC", grpc), ("HTTP", http)):
                    measured = await _measure(stream, num_streams)
                    if number:  # the first round is a warm-up
                        rounds[name].append(measured)
            for name, measures in rounds.items():
                rate, ttft, itl, itl_p99 = (statistics.median(values) for values in zip(*measures, strict=True))
                print(f"| {num_streams} | {name} | {rate:,.0f} | {ttft:.1f} | {itl:.1f} | {itl_p99:.1f} |", flush=True)


async def _measure(stream: Stream, num_streams: int) -> tuple[float, ...]:
    """Returns tokens/s, the medians of TTFT and ITL in ms, and the p99 of ITL in ms."""
    first: list[float] = []
    between: list[float] = []

    async def read() -> None:
        last_s = time.perf_counter()
        has_started = False
        async for _ in stream():
            now_s = time.perf_counter()
            (between if has_started else first).append((now_s - last_s) * 1e3)
            has_started, last_s = True, now_s

    start_s = time.perf_counter()
    await asyncio.gather(*(read() for _ in range(num_streams)))
    rate = num_streams * NUM_TOKENS / (time.perf_counter() - start_s)
    return rate, statistics.median(first), statistics.median(between), statistics.quantiles(between, n=100)[98]


if __name__ == "__main__":
    asyncio.run(main())
