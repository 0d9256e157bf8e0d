"""How long requests wait on several servers, by their number, load and routing: a simulation by step times.

python -m benchmarks.simulate [--card H200] [--share 0.7] [--servers 4] [--prompt 512] [--output 256] [--trace FILE]

Requests arrive at random times, with lengths spread exponentially around the given means, or as in a trace of Azure's
(TIMESTAMP,ContextTokens,GeneratedTokens), compressed to the load and cut to the model's context. A step takes what
`gpu_plan` says that it costs on the card, divided by the share of its limits that is reached. `simulation` says what is
simulated, and `simulate_chats` has conversations.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from benchmarks.gpu_plan import DATA_SHEETS, MEMORY_GIB, MPT_7B, cache_tokens, step_cost
from benchmarks.simulation import ROUTERS, Request, simulate
from mpt_grpc.model.config import MPTConfig

_MEMORY_GIB = {
    "L4": MEMORY_GIB["L4, A10, 24 GB"],
    "A100": MEMORY_GIB["A100, H100, 80 GB"],
    "H100": MEMORY_GIB["A100, H100, 80 GB"],
    "H200": MEMORY_GIB["H200, 141 GB"],
}
"""The memory of the cards in `DATA_SHEETS`."""
LEAST = ROUTERS["least of all, as one Python client or gateway"]
_CONFIG = MPTConfig.from_dict(MPT_7B)


def arrivals(rate: float, number: int, prompt: int, output: int, max_tokens: int, seed: int = 0) -> list[Request]:
    """Returns requests at `rate` per second, whose prompts and outputs together have at most `max_tokens`."""
    chance, now_s, requests = random.Random(seed), 0.0, []
    for _ in range(number):
        now_s += chance.expovariate(rate)
        lengths = [1 + int(chance.expovariate(1 / mean)) for mean in (prompt, output)]
        requests.append(Request(now_s, *(min(length, max_tokens // 2) for length in lengths)))
    return requests


def traced_arrivals(
    trace: Sequence[tuple[float, int, int]], rate: float, number: int, max_tokens: int
) -> list[Request]:
    """Returns `number` requests of a trace, repeated as often as needed, at `rate` per second on average.

    trace: arrival times in seconds, and the tokens of prompts and of outputs.
    """
    length_s = trace[-1][0] - trace[0][0]
    scale = len(trace) / rate / length_s
    requests = []
    for index in range(number):
        round_number, place = divmod(index, len(trace))
        time_s, *lengths = trace[place]
        arrival_s = (round_number * length_s + time_s - trace[0][0]) * scale
        requests.append(Request(arrival_s, *(min(max(1, length), max_tokens // 2) for length in lengths)))
    return requests


def read_trace(path: Path) -> list[tuple[float, int, int]]:
    """Returns a trace of Azure's, for `traced_arrivals`."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            (
                datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
                int(row["ContextTokens"]),
                int(row["GeneratedTokens"]),
            )
            for row in csv.DictReader(file)
        ]


def card_seconds(card: str, share: float) -> Callable[[int, int, int], float]:
    """Returns the time of a step of MPT-7B on a card of which a share of the limits is reached."""

    limits, weights, token = DATA_SHEETS[card], step_cost(_CONFIG, 1, 0), step_cost(_CONFIG, 1, 1)
    operations_per_pair = token.operations - weights.operations

    # What step_cost computes, without counting the parameters for every step.
    def seconds(num_sequences: int, context: int, chunk: int) -> float:
        num_bytes = weights.weight_bytes + (num_sequences * context + chunk) * token.cache_bytes
        pairs = num_sequences * context + chunk * (chunk + 1) // 2
        operations = (num_sequences + chunk) * weights.operations + pairs * operations_per_pair
        return max(num_bytes / limits.bytes_per_s, operations / limits.operations_per_s) / share

    return seconds


def card_tokens(card: str) -> int:
    """Returns the tokens for which a card has memory beside the weights."""
    return cache_tokens(_CONFIG, _MEMORY_GIB[card])


def capacity(serve: Callable[..., None], make: Callable[..., list[Request]]) -> float:
    """Returns the requests per second of one server that always has requests waiting."""
    requests = make(1e6, 1500)
    serve(requests, 1, router=LEAST)
    ends = sorted(request.end_s for request in requests)
    half = len(ends) // 4
    return 2 * half / (ends[3 * half] - ends[half])


def _row(name: str, requests: Sequence[Request]) -> str:
    warm = requests[len(requests) // 5 :]
    first = sorted(request.first_token_s - request.arrival_s for request in warm)
    token = sorted(
        (request.end_s - request.first_token_s) / (request.output_tokens - 1)
        for request in warm
        if request.output_tokens > 8
    )
    waits = [f"{1000 * first[len(first) * percent // 100]:,.0f}" for percent in (50, 95, 99)]
    paces = [f"{1000 * token[len(token) * percent // 100]:.1f}" for percent in (50, 95)]
    return f"| {' | '.join([name, *waits, *paces])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=DATA_SHEETS, default="H200")
    parser.add_argument("--share", type=float, default=0.7, help="the share of the card's limits that steps reach")
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512, help="mean tokens of a prompt")
    parser.add_argument("--output", type=int, default=256, help="mean tokens of an output")
    parser.add_argument("--requests", type=int, default=4000, help="requests of each row, for each server")
    parser.add_argument("--trace", type=Path, help="a CSV file with arrivals and lengths, instead of random ones")
    parsed = parser.parse_args()
    tokens, seconds = card_tokens(parsed.card), card_seconds(parsed.card, parsed.share)
    make: Callable[[float, int], list[Request]]
    if parsed.trace is None:
        make = partial(arrivals, prompt=parsed.prompt, output=parsed.output, max_tokens=_CONFIG.max_seq_len)
    else:
        make = partial(traced_arrivals, read_trace(parsed.trace), max_tokens=_CONFIG.max_seq_len)
    serve = partial(simulate, cache_tokens=tokens, seconds=seconds)
    per_server = capacity(serve, make)
    print(f"{parsed.card}: {tokens:,} tokens of cache, {per_server:.1f} requests/s at most on one server\n")
    head = "first token ms, median | 95% | 99% | ms per token, median | 95% |\n|---|---|---|---|---|---|"
    for title, cases in (
        ("load of one server", [(f"{load:.0%}", load, 1, LEAST) for load in (0.5, 0.7, 0.8, 0.9, 0.95, 1.1)]),
        ("servers at 90% load", [(str(n), 0.9, n, LEAST) for n in (1, 2, 4, 8)]),
        (
            f"routing to {parsed.servers} servers at 90% load",
            [(name, 0.9, parsed.servers, router) for name, router in ROUTERS.items()],
        ),
    ):
        print(f"| {title} | {head}")
        for name, load, num_servers, router in cases:
            requests = make(load * per_server * num_servers, parsed.requests * num_servers)
            serve(requests, num_servers, router=router)
            print(_row(name, requests), flush=True)
        print()


if __name__ == "__main__":
    main()
