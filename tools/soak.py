"""Loads a server with all that callers do, good and bad, and checks that nothing is left of it at the end.

Prints how often each kind of caller came, and what the process held before and after: blocks of the cache, requests,
threads, open files and memory. Exits with status 1 if something is left, if memory has grown by more than a few
percent, or if a call ended in a way that it must not.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import grpc

from mpt_grpc_client import (
    AsyncClient,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
)
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub
from tools.streams import ServerProcess, request

NUM_CALLERS = 16
NUM_KINDS_OF_REQUESTS = 30
WARM_UP_SHARE = 0.2
"""The part of the time after which memory is measured first: by then each kind of caller has come."""
MAX_MORE = 8
"""How many more threads and open files are no leak: pools grow up to their limit the first time that all is in use."""
IDLE_S = 2.5
"""How long the server is left alone before it is measured; it returns memory when it is idle."""


class Held(NamedTuple):
    """What the process holds."""

    num_used_blocks: int
    num_requests: int
    num_threads: int
    num_files: int
    memory_mib: float


async def generate(client: AsyncClient, _target: str) -> None:
    prompt, options = request(random.randrange(NUM_KINDS_OF_REQUESTS))
    await client.generate(prompt, **options)


async def stream(client: AsyncClient, _target: str) -> None:
    prompt, options = request(random.randrange(NUM_KINDS_OF_REQUESTS))
    async for _ in client.stream(prompt, **options).deltas():
        pass


async def read_slowly(client: AsyncClient, _target: str) -> None:
    prompt, options = request(random.randrange(NUM_KINDS_OF_REQUESTS))
    async for _ in client.stream(prompt, **options).deltas():
        await asyncio.sleep(0.02)


async def leave(client: AsyncClient, _target: str) -> None:
    prompt, options = request(random.randrange(NUM_KINDS_OF_REQUESTS))
    async with client.stream(prompt, **options) as pieces:
        remaining = random.randrange(10)
        async for _ in pieces.deltas():
            if not remaining:
                break
            remaining -= 1


async def disconnect(_client: AsyncClient, target: str) -> None:
    async with AsyncClient(target) as own:
        prompt, options = request(random.randrange(NUM_KINDS_OF_REQUESTS))
        reading = asyncio.ensure_future(own.generate(prompt, **options))
        await asyncio.sleep(random.uniform(0, 0.2))
    await asyncio.gather(reading, return_exceptions=True)


async def miss_the_deadline(client: AsyncClient, _target: str) -> None:
    try:
        await client.generate(
            "Once upon a time", max_new_tokens=1000, ignore_eos=True, timeout=random.uniform(0.05, 0.3)
        )
    except (DeadlineExceededError, OverloadedError):
        return


async def be_wrong(client: AsyncClient, _target: str) -> None:
    try:
        await client.generate("Once", temperature=-1, top_p=7, stop_strings=["a"] * 100)
    except InvalidRequestError:
        return
    raise AssertionError("an invalid request was accepted")


async def flood(client: AsyncClient, _target: str) -> None:
    calls = (client.generate("Once", max_new_tokens=2, ignore_eos=True) for _ in range(100))
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, OverloadedError):
            raise result


CALLERS: tuple[Callable[[AsyncClient, str], Awaitable[None]], ...] = (
    generate,
    stream,
    read_slowly,
    leave,
    disconnect,
    miss_the_deadline,
    be_wrong,
    flood,
)


async def load(client: AsyncClient, target: str, seconds: float) -> Counter[str]:
    """Returns how often each kind of caller came, and how many were refused because of the others."""
    counts: Counter[str] = Counter()
    end_s = time.monotonic() + seconds

    async def call() -> None:
        while time.monotonic() < end_s:
            caller = random.choice(CALLERS)
            try:
                await caller(client, target)
                counts[caller.__name__.replace("_", " ")] += 1
            except OverloadedError:
                counts["be refused"] += 1

    await asyncio.gather(*(call() for _ in range(NUM_CALLERS)))
    return counts


async def held(server: ServerProcess) -> Held:
    """Returns what the process holds once it is idle."""
    await asyncio.sleep(IDLE_S)
    async with grpc.aio.insecure_channel(server.target) as channel:
        info = await TextGenerationServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest())
    process = Path(f"/proc/{server.process.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    load = info.load
    return Held(
        load.num_blocks - load.num_free_blocks,
        load.num_running_requests + load.num_waiting_requests + load.num_preparing_requests,
        int(status["Threads"]),
        len(list((process / "fd").iterdir())),
        int(status["VmRSS"].split()[0]) / 1024,
    )


async def soak(seconds: float) -> tuple[Counter[str], Held, Held]:
    server = ServerProcess("--max-running-requests", "16", "--max-waiting-requests", "64")
    try:
        server.wait_until_ready()
        async with AsyncClient(server.target, timeout=60, retries=False) as client:
            counts = await load(client, server.target, seconds * WARM_UP_SHARE)
            before = await held(server)
            counts += await load(client, server.target, seconds * (1 - WARM_UP_SHARE))
            return counts, before, await held(server)
    finally:
        server.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="how long to load the server (default: 30)")
    parser.add_argument("--max-growth", type=float, default=2, help="of memory, in percent (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the callers' choices (default: 0)")
    parsed = parser.parse_args()
    random.seed(parsed.seed)
    counts, before, after = asyncio.run(soak(parsed.minutes * 60))
    for kind, count in sorted(counts.items()):
        print(f"{count:8} x {kind}")
    growth = 100 * (after.memory_mib / before.memory_mib - 1)
    print(f"{'':24}before   after\nblocks in use  {before.num_used_blocks:15} {after.num_used_blocks:7}")
    print(f"requests       {before.num_requests:15} {after.num_requests:7}")
    print(f"threads        {before.num_threads:15} {after.num_threads:7}")
    print(f"open files     {before.num_files:15} {after.num_files:7}")
    print(f"memory, MiB    {before.memory_mib:15.0f} {after.memory_mib:7.0f}  {growth:+.1f} %")
    more = max(after.num_threads - before.num_threads, after.num_files - before.num_files)
    is_left = after.num_used_blocks + after.num_requests > 0
    return int(is_left or more > MAX_MORE or growth > parsed.max_growth)


if __name__ == "__main__":
    sys.exit(main())
