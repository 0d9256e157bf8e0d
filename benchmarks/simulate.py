"""How long requests wait on several servers, by their number, load and routing: a simulation by step times.

python -m benchmarks.simulate [--card H200] [--share 0.7] [--servers 4] [--prompt 512] [--output 256]

Requests arrive at random times, with lengths spread exponentially around the given means. A step takes what
`gpu_plan` says that it costs on the card, divided by the share of its limits that is reached. As in the server, a step
gives every running output one token, and the rest of its budget to the oldest prompts; a request starts when there are
a slot and memory for it. Preemption, prefix caching, fair shares and the network are left out.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks.gpu_plan import DATA_SHEETS, MPT_7B, step_cost
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.settings import SchedulerSettings

MEMORY = {"L4": 24e9, "A100": 80e9, "H100": 80e9, "H200": 141e9}
"""The bytes of the cards in `DATA_SHEETS`."""
_MEMORY_FRACTION = 0.9
_CONFIG = MPTConfig.from_dict(MPT_7B)
_MAX_SLOTS, _MAX_STEP_TOKENS = SchedulerSettings().max_running_requests, SchedulerSettings().max_step_tokens


@dataclass
class Request:
    """A request and its times, in seconds."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    num_computed: int = 0
    """Tokens of the prompt."""
    first_token_s: float = 0.0
    end_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass
class Server:
    """A server between two steps. Outputs are ordered by the number of the step with their last token."""

    cache_tokens: int
    waiting: deque[Request] = field(default_factory=deque)
    prompts: deque[Request] = field(default_factory=deque)
    """Requests with a slot whose prompts are not computed yet."""
    decoding: list[tuple[int, int, Request]] = field(default_factory=list)
    num_steps: int = 0
    used_tokens: int = 0
    is_busy: bool = False

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + len(self.prompts) + len(self.decoding)

    def begin_step(self, seconds: Callable[[int, int, int], float]) -> tuple[float, list[Request]]:
        """Starts what has a slot and memory; returns the time of the step and the requests that get a first token."""
        while (
            self.waiting
            and len(self.prompts) + len(self.decoding) < _MAX_SLOTS
            and self.used_tokens + self.waiting[0].num_tokens <= self.cache_tokens
        ):
            request = self.waiting.popleft()
            self.used_tokens += request.num_tokens
            self.prompts.append(request)
        budget, chunk, started = _MAX_STEP_TOKENS - len(self.decoding), 0, []
        while self.prompts and chunk < budget:
            request = self.prompts[0]
            part = min(request.prompt_tokens - request.num_computed, budget - chunk)
            chunk += part
            request.num_computed += part
            if request.num_computed == request.prompt_tokens:
                started.append(self.prompts.popleft())
        # What requests reserve is a little more than what they attend to: they reach it with their last token.
        context = self.used_tokens // (len(self.decoding) + len(self.prompts) + len(started))
        return seconds(len(self.decoding), context, chunk), started

    def end_step(self, now_s: float, started: list[Request]) -> list[Request]:
        """Gives each output its token, and returns the requests that have ended."""
        self.num_steps += 1
        for request in started:
            request.first_token_s = now_s
            heapq.heappush(self.decoding, (self.num_steps + request.output_tokens - 1, id(request), request))
        ended = []
        while self.decoding and self.decoding[0][0] <= self.num_steps:
            request = heapq.heappop(self.decoding)[2]
            request.end_s = now_s
            self.used_tokens -= request.num_tokens
            ended.append(request)
        return ended


Router = Callable[[Sequence[Server], int, random.Random], Server]


def _random(servers: Sequence[Server], _: int, chance: random.Random) -> Server:
    return chance.choice(servers)


def _round_robin(servers: Sequence[Server], number: int, _: random.Random) -> Server:
    return servers[number % len(servers)]


def _least_of_two(servers: Sequence[Server], _: int, chance: random.Random) -> Server:
    one, other = chance.choice(servers), chance.choice(servers)
    return min(one, other, key=lambda server: server.num_requests)


def _least(servers: Sequence[Server], _: int, chance: random.Random) -> Server:
    return min(servers, key=lambda server: (server.num_requests, chance.random()))


ROUTERS: dict[str, Router] = {
    "random": _random,
    "round robin, as the Python client": _round_robin,
    "least of two, as Envoy": _least_of_two,
    "least of all": _least,
}


def simulate(
    requests: Sequence[Request],
    num_servers: int,
    cache_tokens: int,
    seconds: Callable[[int, int, int], float],
    router: Router,
    seed: int = 0,
) -> None:
    """Serves requests, in the order of their arrival, and notes their times.

    seconds: the time of a step with a number of outputs, their mean context, and the tokens of prompts.
    Raises ValueError for a request that does not fit in the cache.
    """
    if max(request.num_tokens for request in requests) > cache_tokens:
        raise ValueError(f"a request needs more than the {cache_tokens} tokens of the cache")
    chance = random.Random(seed)
    servers = [Server(cache_tokens) for _ in range(num_servers)]
    # The ends of steps, one at most for each server.
    steps: list[tuple[float, int, list[Request]]] = []

    def begin(index: int, now_s: float) -> None:
        server = servers[index]
        server.is_busy = server.num_requests > 0
        if server.is_busy:
            duration_s, started = server.begin_step(seconds)
            heapq.heappush(steps, (now_s + duration_s, index, started))

    def finish_steps(until_s: float) -> None:
        while steps and steps[0][0] <= until_s:
            now_s, index, started = heapq.heappop(steps)
            servers[index].end_step(now_s, started)
            begin(index, now_s)

    for number, request in enumerate(requests):
        finish_steps(request.arrival_s)
        server = router(servers, number, chance)
        server.waiting.append(request)
        if not server.is_busy:
            begin(servers.index(server), request.arrival_s)
    finish_steps(float("inf"))


def arrivals(rate: float, number: int, prompt: int, output: int, max_tokens: int, seed: int = 0) -> list[Request]:
    """Returns requests at `rate` per second, whose prompts and outputs together have at most `max_tokens`."""
    chance, now_s, requests = random.Random(seed), 0.0, []
    for _ in range(number):
        now_s += chance.expovariate(rate)
        lengths = [1 + int(chance.expovariate(1 / mean)) for mean in (prompt, output)]
        requests.append(Request(now_s, *(min(length, max_tokens // 2) for length in lengths)))
    return requests


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
    cost = step_cost(_CONFIG, 1, 1)
    return int((_MEMORY_FRACTION * MEMORY[card] - cost.weight_bytes) // cost.cache_bytes)


def capacity(serve: Callable[..., None], make: Callable[..., list[Request]]) -> float:
    """Returns the requests per second of one server that always has requests waiting."""
    requests = make(1e6, 1500)
    serve(requests, 1, router=_least)
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
    parsed = parser.parse_args()
    tokens, seconds = card_tokens(parsed.card), card_seconds(parsed.card, parsed.share)
    make = partial(arrivals, prompt=parsed.prompt, output=parsed.output, max_tokens=_CONFIG.max_seq_len)
    serve = partial(simulate, cache_tokens=tokens, seconds=seconds)
    per_server = capacity(serve, make)
    print(f"{parsed.card}: {tokens:,} tokens of cache, {per_server:.1f} requests/s at most on one server\n")
    head = "first token ms, median | 95% | 99% | ms per token, median | 95% |\n|---|---|---|---|---|---|"
    for title, cases in (
        ("load of one server", [(f"{load:.0%}", load, 1, _least) for load in (0.5, 0.7, 0.8, 0.9, 0.95, 1.1)]),
        ("servers at 90% load", [(str(n), 0.9, n, _least) for n in (1, 2, 4, 8)]),
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
