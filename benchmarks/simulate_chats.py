"""How routing by prompts serves conversations on 1 to 256 servers: a simulation by step times, see `simulation`.

python -m benchmarks.simulate_chats [--card H200] [--share 0.7] [--load 0.9] [--plot FILE]

A user begins, reads each response for a while and sends the next message, together with all before it. The load is that
of servers without a prefix cache: 1 is what they can do. A request is good whose first token takes at most 0.5 s and
whose others take at most 25 ms each.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.gpu_plan import DATA_SHEETS
from benchmarks.simulate import LEAST, capacity, card_seconds, card_tokens
from benchmarks.simulation import ROUTERS, Request, Router, Server, simulate
from mpt_grpc_client import routing

MAX_TOKENS = 2048
_SYSTEM_TOKENS, _MESSAGE_TOKENS, _OUTPUT_TOKENS, _TURNS, _THINK_S = 100, 100, 120, 6, 5.0
_TURNS_SENT = 4.4
"""How many of these fit in the context, on average."""
_LONG_S = 120.0
"""By then, most conversations have ended."""
_FIRST_S, _TOKEN_S = 0.5, 0.025
_SERVERS, _FLEET, _LOADS = (1, 4, 16, 64, 256), 16, (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05)
_Measured = tuple[float, float, float, float]
"""What `measure` returns."""


def by_prompt(servers: Sequence[Server], number: int, request: Request, _: random.Random) -> Server:
    """The routing of the Python client, as one client or gateway that all requests pass."""
    loads = [server.num_requests for server in servers]
    beginning = b"" if request.conversation is None else str(request.conversation).encode()
    return servers[routing.order(beginning, _names(len(servers)), loads, number % len(servers))[0]]


def _names(number: int) -> tuple[str, ...]:
    return tuple(f"server-{index}:50051" for index in range(number))


CHAT_ROUTERS: dict[str, Router] = {
    "in turns": ROUTERS["in turns"],
    "fewest requests": LEAST,
    "by prompt": by_prompt,
}


def chats(rate: float, number: int, seed: int = 0) -> list[Request]:
    """Returns the turns of conversations, at `rate` turns per second from the start, when many have begun already."""
    chance, now_s, requests = random.Random(seed), -_LONG_S, list[Request]()
    conversation = 0
    while now_s < number / rate:
        now_s += chance.expovariate(rate / _TURNS_SENT)
        arrival_s, prompt = now_s, _SYSTEM_TOKENS
        for _ in range(1 + int(chance.expovariate(1 / (_TURNS - 0.5)))):
            lengths = [1 + int(chance.expovariate(1 / mean)) for mean in (_MESSAGE_TOKENS, _OUTPUT_TOKENS)]
            prompt += lengths[0]
            if prompt + lengths[1] > MAX_TOKENS:
                break
            if arrival_s >= 0:
                requests.append(Request(arrival_s, prompt, lengths[1], conversation))
            prompt += lengths[1]
            arrival_s += chance.expovariate(1 / _THINK_S) + lengths[1] * _TOKEN_S
        conversation += 1
    return sorted(requests, key=lambda request: request.arrival_s)[:number]


def measure(requests: Sequence[Request]) -> _Measured:
    """Returns the fraction of cached prompt tokens, the median and the 99% of the first token, and that of good ones.

    The first half is left out, in which the caches do not have all conversations that had begun already.
    """
    warm = requests[len(requests) // 2 :]
    first = sorted(request.first_token_s - request.arrival_s for request in warm)
    good = sum(
        request.first_token_s - request.arrival_s <= _FIRST_S
        and request.end_s - request.first_token_s <= _TOKEN_S * max(1, request.output_tokens - 1)
        for request in warm
    )
    hits = sum(request.num_cached for request in warm) / sum(request.prompt_tokens for request in warm)
    return hits, first[len(first) // 2], first[len(first) * 99 // 100], good / len(warm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=DATA_SHEETS, default="H200")
    parser.add_argument("--share", type=float, default=0.7, help="the share of the card's limits that steps reach")
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--requests", type=int, default=800, help="requests for each server")
    parser.add_argument("--plot", type=Path, help="a file for a picture, which needs matplotlib")
    parsed = parser.parse_args()
    serve = partial(simulate, cache_tokens=card_tokens(parsed.card), seconds=card_seconds(parsed.card, parsed.share))
    uncached = capacity(
        serve, lambda _, number: [replace(r, arrival_s=0.0, conversation=None) for r in chats(50.0, number)]
    )
    print(f"{parsed.card}: {uncached:.1f} turns/s at most on one server without a prefix cache\n")

    def table(title: str, cases: Sequence[tuple[str, int, float]]) -> dict[str, list[_Measured]]:
        """Prints the cases, which have a name, a number of servers and a load; returns a list for each routing."""
        print(f"| {title} | routing | prompt tokens in the cache | first token ms, median | 99% | good |")
        print("|---|---|---|---|---|---|")
        results: dict[str, list[_Measured]] = {name: [] for name in CHAT_ROUTERS}
        for case, num_servers, load in cases:
            for name, router in CHAT_ROUTERS.items():
                requests = chats(load * uncached * num_servers, parsed.requests * num_servers)
                serve(requests, num_servers, router=router)
                hits, median_s, p99_s, good = measured = measure(requests)
                results[name].append(measured)
                cells = (f"{hits:.0%}", f"{1000 * median_s:,.0f}", f"{1000 * p99_s:,.0f}", f"{good:.1%}")
                print(f"| {case} | {name} | {' | '.join(cells)} |", flush=True)
        print()
        return results

    by_number = table(f"servers at {parsed.load:.0%} load", [(str(n), n, parsed.load) for n in _SERVERS])
    by_load = table(f"load of {_FLEET} servers", [(f"{load:.0%}", _FLEET, load) for load in _LOADS])
    if parsed.plot is not None:
        _plot(by_number, by_load, parsed.plot)


def _plot(by_number: dict[str, list[_Measured]], by_load: dict[str, list[_Measured]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in by_number.items():
        left.plot(_SERVERS, [row[2] for row in rows], marker="o", label=name)
        right.plot(_LOADS, [row[3] for row in by_load[name]], marker="o", label=name)
    left.set(title="Time to first token, 99th percentile", xlabel="servers", ylabel="seconds")
    left.set(xscale="log", xticks=_SERVERS, xticklabels=_SERVERS)
    right.set(title=f"Share of good requests, on {_FLEET} servers", xlabel="load")
    for axes in (left, right):
        axes.set_ylim(0, None)
        axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
