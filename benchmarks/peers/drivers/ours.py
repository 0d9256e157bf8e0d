"""This project: `mpt-grpc serve` in a process of its own, called over gRPC with token IDs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from benchmarks.peers.drivers import ladder
from benchmarks.peers.drivers.ladder import Generate, Generation, Prompts
from mpt_grpc_client import AsyncClient


@contextmanager
def open_model(folder: Path, bits: int, _threads: int) -> Iterator[Generate]:
    """OMP_NUM_THREADS, which is set for every driver, is the server's number of threads."""
    with served("--model", str(folder), *(["--quantize", "int8"] if bits == 8 else [])) as target:
        yield lambda prompts, new_tokens: asyncio.run(_generate(target, prompts, new_tokens))


@contextmanager
def served(*flags: str) -> Iterator[str]:
    """Yields the target of a server in a process of its own."""
    quiet = ("--grpc-port", "0", "--no-http", "--log-level", "warning")
    command = [sys.executable, "-m", "mpt_grpc.cli", "serve", *quiet, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            words = (line.split() for line in server.stdout)
            target = next((line[1] for line in words if line[:1] == ["gRPC"]), None)
            if target is None:
                sys.exit(1)  # the server has said why
            yield target
        finally:
            server.terminate()


async def _generate(target: str, prompts: Prompts, new_tokens: int) -> Generation:
    async with AsyncClient(target) as client:
        await client.get_model_info()  # connects
        return await streams(client, prompts, new_tokens)


async def streams(client: AsyncClient, prompts: Prompts, new_tokens: int) -> Generation:
    """Continues all prompts at once, greedily, by a number of tokens, whatever they are."""

    async def read(prompt: Sequence[int]) -> list[float]:
        times_s: list[float] = []
        async with client.stream(prompt, temperature=0, max_new_tokens=new_tokens, ignore_eos=True) as stream:
            async for delta in stream.deltas():
                times_s += [perf_counter()] * delta.num_tokens
        return times_s

    start_s = perf_counter()
    return Generation(start_s, await asyncio.gather(*map(read, prompts)))


if __name__ == "__main__":
    ladder.run("mpt-grpc", open_model)
