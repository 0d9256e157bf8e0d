"""Loads that a server must survive: nothing of others' streams is lost, and the next stream begins soon after."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from mpt_grpc_client import AsyncClient, Generation, InvalidRequestError, OverloadedError
from tools.streams import TIMEOUT_S, ServerProcess, Tally, essence, read, request, undisturbed

NUM_SLOTS = 16
MEASURED_S = 10.0
MIN_GOODPUT = 0.9
"""The lowest goodput that passes, as a part of its peak."""
CALLERS = ("one", "other")


@dataclass
class Callers:
    """Two callers of a server, what the streams of the second are without a load, and how many calls a load makes."""

    one: AsyncClient
    other: AsyncClient
    expected: Sequence[Generation]
    num_cancels: int


async def compare(callers: Callers, tally: Tally, on_delta: Callable[[], Awaitable[None]] | None = None) -> None:
    """Reads the other caller's streams, and counts those that failed or differ."""

    async def result(number: int) -> Generation:
        if on_delta is None:
            return await read(callers.other, number, Tally(), lambda: None)
        prompt, options = request(number)
        stream = callers.other.stream(prompt, **options)
        async for _ in stream.deltas():
            await on_delta()
        return stream.result

    results = await asyncio.gather(*map(result, range(len(callers.expected))), return_exceptions=True)
    for whole, read_one in zip(callers.expected, results, strict=True):
        tally.num_calls += 1
        tally.num_lost += isinstance(read_one, BaseException) or essence(read_one) != whole


async def flood(callers: Callers, tally: Tally) -> None:
    calls = [callers.one.generate("Once " * 100, max_new_tokens=20, ignore_eos=True) for _ in range(500)]
    flooding = asyncio.gather(*calls, return_exceptions=True)
    await compare(callers, tally)
    results = await flooding
    tally.num_calls += len(results)
    tally.num_lost += sum(isinstance(r, BaseException) and not isinstance(r, OverloadedError) for r in results)


async def read_slowly(callers: Callers, tally: Tally) -> None:
    await compare(callers, tally, lambda: asyncio.sleep(0.1))


async def cancel(callers: Callers, tally: Tally) -> None:
    async def leave(number: int) -> None:
        async with callers.one.stream("Once", max_new_tokens=200, ignore_eos=True) as stream:
            if number % 2:
                await anext(stream)
            else:  # wherever the call is then, also before it is sent
                await asyncio.sleep(random.uniform(0, 0.02))

    async def leave_often() -> None:
        for number in range(callers.num_cancels // NUM_SLOTS):
            try:
                await leave(number)
            except Exception as error:
                tally.num_lost += not isinstance(error, OverloadedError)
            tally.num_calls += 1

    await asyncio.gather(compare(callers, tally), *(leave_often() for _ in range(NUM_SLOTS)))


async def send_huge_prompts(callers: Callers, tally: Tally) -> None:
    async def send(prompt: str | list[int]) -> None:
        tally.num_calls += 1
        try:
            await callers.one.generate(prompt)
        except (InvalidRequestError, OverloadedError):
            return
        except Exception as error:
            print(f"huge prompt: {error!r}")
        tally.num_lost += 1

    prompts: list[str | list[int]] = ["word " * 400_000, [5] * 500_000]
    await asyncio.gather(compare(callers, tally), *(send(prompts[number % 2]) for number in range(20)))


async def overload(callers: Callers, tally: Tally) -> None:
    async def goodput(num_callers: int) -> float:
        num_tokens, end_s = 0, time.monotonic() + MEASURED_S

        async def call() -> None:
            nonlocal num_tokens
            while time.monotonic() < end_s:
                tally.num_calls += 1
                try:
                    generation = await callers.one.generate("Once", max_new_tokens=50, ignore_eos=True)
                except OverloadedError:
                    await asyncio.sleep(0.05)
                else:
                    num_tokens += generation.usage.num_output_tokens * (time.monotonic() < end_s)

        await asyncio.gather(*(call() for _ in range(num_callers)))
        return num_tokens

    peak = await goodput(NUM_SLOTS)
    overloaded = await goodput(3 * NUM_SLOTS)
    if overloaded < MIN_GOODPUT * peak:
        tally.num_lost += 1
        print(f"overload: goodput is {overloaded / peak:.0%} of its peak")


LOADS: Mapping[str, tuple[str, Callable[[Callers, Tally], Awaitable[None]]]] = {
    "flood": ("500 requests of one caller at once, beside another's streams", flood),
    "slow": ("slow readers", read_slowly),
    "cancel": ("cancelled calls, beside another's streams", cancel),
    "huge": ("huge prompts, beside another's streams", send_huge_prompts),
    "overload": (
        f"three times as many calls as fill the batch; goodput below {MIN_GOODPUT:.0%} of its peak is lost",
        overload,
    ),
}


async def run_loads(names: Sequence[str], num_rounds: int, num_streams: int, num_cancels: int) -> dict[str, Tally]:
    """Loads a server that knows two callers, in each way as often as told."""
    with TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.toml"
        entries = (
            f'[[tokens]]\nname = "{name}"\nroles = ["generate"]\nsha256 = "{sha256(name.encode()).hexdigest()}"\n'
            for name in CALLERS
        )
        tokens.write_text("".join(entries), encoding="utf-8")
        server = ServerProcess("--tokens-file", str(tokens), "--max-running-requests", str(NUM_SLOTS))
        try:
            server.wait_until_ready()
            tallies = {LOADS[name][0]: Tally() for name in names}
            async with (
                AsyncClient(server.target, token=CALLERS[0], timeout=TIMEOUT_S, retries=False) as one,
                AsyncClient(server.target, token=CALLERS[1], timeout=TIMEOUT_S) as other,
            ):
                callers = Callers(one, other, await undisturbed(other, num_streams), num_cancels)
                for _ in range(num_rounds):
                    for name in names:
                        description, load = LOADS[name]
                        tally = tallies[description]
                        await load(callers, tally)
                        start_s = time.monotonic()
                        async with other.stream("Once", max_new_tokens=5) as stream:
                            await anext(stream)
                        tally.num_rounds += 1
                        tally.pauses_s.append(time.monotonic() - start_s)
            return tallies
        finally:
            server.kill()
