"""A burst of arrivals is spread over turns of the event loop, in order."""

from __future__ import annotations

import asyncio
from itertools import groupby

from mpt_grpc.turnstile import Turnstile


async def test_a_burst_passes_in_order_a_few_in_each_turn() -> None:
    turnstile, loop, passed, turn = Turnstile(), asyncio.get_running_loop(), list[tuple[int, int]](), 0

    def count_turns() -> None:
        nonlocal turn
        turn += 1
        if len(passed) < 10:
            loop.call_soon(count_turns)

    async def arrive(number: int) -> None:
        await turnstile.wait()
        passed.append((turn, number))

    loop.call_soon(count_turns)
    await asyncio.gather(*map(arrive, range(10)))
    assert [number for _, number in passed] == list(range(10))
    assert all(len(list(together)) <= 2 for _, together in groupby(passed, key=lambda pair: pair[0]))


async def test_those_who_leave_hold_up_no_one() -> None:
    turnstile = Turnstile()
    arrivals = [asyncio.create_task(turnstile.wait()) for _ in range(10)]
    await asyncio.sleep(0)
    for arrival in arrivals[2:9]:
        arrival.cancel()
    await asyncio.wait(arrivals)
    assert [arrival.cancelled() for arrival in arrivals] == [False] * 2 + [True] * 7 + [False]
    await turnstile.wait()


async def test_once_it_is_open_all_pass_at_once() -> None:
    turnstile = Turnstile()
    arrivals = [asyncio.create_task(turnstile.wait()) for _ in range(10)]
    await asyncio.sleep(0)
    turnstile.open()
    await asyncio.sleep(0)
    assert all(arrival.done() for arrival in arrivals)
    for _ in range(10):
        late = asyncio.create_task(turnstile.wait())
        await asyncio.sleep(0)
        assert late.done()
