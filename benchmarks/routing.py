"""Measures what routing by prompts does for chats with a common system message: cache hits, and times to first token.

python -m benchmarks.routing --target localhost:50051,localhost:50052,localhost:50053

The servers should serve nothing else. Users take their turns in a random order, a few at a time, and every turn sends
the whole conversation. Each round and routing has a cache salt of its own, so that it finds the caches empty.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from mpt_grpc_client import AsyncClient, Message, Role
from mpt_grpc_client.targets import resolve_targets

_WORDS = "the fox old sea ship and ran to far house king said little tree of bird went home with stone".split()
_OUTPUT_TOKENS = 24


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the servers, separated by commas")
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--turns", type=int, default=6, help="turns of each conversation")
    parser.add_argument("--concurrency", type=int, default=4, help="turns in progress at any time")
    parser.add_argument("--rounds", type=int, default=3)
    parsed = parser.parse_args()
    targets = resolve_targets(parsed.target)
    async with AsyncExitStack() as stack:
        together = await stack.enter_async_context(AsyncClient(targets))
        single = [await stack.enter_async_context(AsyncClient(target)) for target in targets]
        in_turn = itertools.cycle(single)
        routings: dict[str, Callable[[], AsyncClient]] = {
            "by prompt": lambda: together,
            "in turns": lambda: next(in_turn),
            "random": lambda: random.choice(single),
        }
        measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in routings}
        for number, (name, choose) in itertools.product(range(parsed.rounds + 1), routings.items()):
            values = await _measure(choose, parsed.users, parsed.turns, parsed.concurrency, f"{name} {number}")
            if number:  # the first round is a warm-up
                measured[name].append(values)
    print("| routing | prompt tokens in the cache | first token ms, median | 95% |\n|---|---|---|---|")
    for name, rounds in measured.items():
        hits, median, p95 = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(f"| {name} | {hits:.0%} | {median:.0f} | {p95:.0f} |")


async def _measure(
    choose: Callable[[], AsyncClient], users: int, turns: int, concurrency: int, salt: str
) -> tuple[float, float, float]:
    """Returns the fraction of cached prompt tokens, and the median and 95% of the times to first token, in ms."""
    chance, limit = random.Random(salt.rpartition(" ")[2]), asyncio.Semaphore(concurrency)
    system = Message(Role.SYSTEM, _text(chance, 150))
    conversations = [[system] for _ in range(users)]
    first_ms: list[float] = []
    num_tokens = num_cached = 0

    async def take_turn(conversation: list[Message]) -> None:
        nonlocal num_tokens, num_cached
        conversation.append(Message(Role.USER, _text(chance, 40)))
        async with limit:
            start_s = time.perf_counter()
            stream = choose().stream(conversation, max_new_tokens=_OUTPUT_TOKENS, ignore_eos=True, cache_salt=salt)
            deltas = stream.deltas()
            await anext(deltas)
            first_ms.append((time.perf_counter() - start_s) * 1e3)
            async for _ in deltas:
                pass
        usage = stream.result.usage
        num_tokens, num_cached = num_tokens + usage.num_prompt_tokens, num_cached + usage.num_cached_tokens
        conversation.append(Message(Role.ASSISTANT, stream.text))

    for _ in range(turns):
        chance.shuffle(conversations)
        await asyncio.gather(*map(take_turn, conversations))
    return num_cached / num_tokens, statistics.median(first_ms), statistics.quantiles(first_ms, n=20)[-1]


def _text(chance: random.Random, num_words: int) -> str:
    return " ".join(chance.choices(_WORDS, k=num_words))


if __name__ == "__main__":
    asyncio.run(main())
