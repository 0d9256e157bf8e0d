"""A simulation of several servers by the times of their steps, for `simulate` and `simulate_chats`.

As in the server, a step gives every running output one token, and the rest of its budget to the oldest prompts; a
request starts when there are a slot and memory for it, with what the prefix cache has of its conversation. Preemption,
fair shares and the network are left out.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mpt_grpc.settings import SchedulerSettings

_MAX_SLOTS, _MAX_STEP_TOKENS = SchedulerSettings().max_running_requests, SchedulerSettings().max_step_tokens


@dataclass
class Request:
    """A request and its times, in seconds."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    conversation: int | None = None
    """Whose earlier turns are the beginning of the prompt."""
    num_computed: int = 0
    """Tokens of the prompt."""
    num_cached: int = 0
    """Tokens of the prompt that were in the prefix cache."""
    first_token_s: float = 0.0
    end_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(eq=False)
class Server:
    """A server between two steps. Outputs are ordered by the number of the step with their last token."""

    cache_tokens: int
    waiting: deque[Request] = field(default_factory=deque)
    prompts: deque[Request] = field(default_factory=deque)
    """Requests with a slot whose prompts are not computed yet."""
    decoding: list[tuple[int, float, int, Request]] = field(default_factory=list)
    num_steps: int = 0
    used_tokens: int = 0
    """What the requests with a slot have reserved."""
    context_tokens: int = 0
    """What the running outputs attend to."""
    cached: dict[int, int] = field(default_factory=dict)
    """The tokens of conversations in the prefix cache, the least recently used first."""
    cached_tokens: int = 0
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
            if request.conversation is not None:
                request.num_cached = min(self._uncache(request.conversation), request.prompt_tokens - 1)
                request.num_computed = request.num_cached
            self._evict()
            self.prompts.append(request)
        budget, chunk, started = _MAX_STEP_TOKENS - len(self.decoding), 0, []
        while self.prompts and chunk < budget:
            request = self.prompts[0]
            part = min(request.prompt_tokens - request.num_computed, budget - chunk)
            chunk += part
            request.num_computed += part
            if request.num_computed == request.prompt_tokens:
                started.append(self.prompts.popleft())
        return seconds(len(self.decoding), self.context_tokens // max(1, len(self.decoding)), chunk), started

    def end_step(self, now_s: float, started: list[Request]) -> list[Request]:
        """Gives each output its token, and returns the requests that have ended."""
        self.num_steps += 1
        self.context_tokens += len(self.decoding)
        for request in started:
            request.first_token_s = now_s
            self.context_tokens += request.prompt_tokens + 1
            last_step = self.num_steps + request.output_tokens - 1
            heapq.heappush(self.decoding, (last_step, request.arrival_s, id(request), request))
        ended = []
        while self.decoding and self.decoding[0][0] <= self.num_steps:
            request = heapq.heappop(self.decoding)[-1]
            request.end_s = now_s
            self.used_tokens -= request.num_tokens
            self.context_tokens -= request.num_tokens
            if request.conversation is not None:
                self._uncache(request.conversation)  # of a turn that was computed at the same time
                self.cached[request.conversation] = request.num_tokens
                self.cached_tokens += request.num_tokens
                self._evict()
            ended.append(request)
        return ended

    def _evict(self) -> None:
        """Frees the least recently used conversations until all have room."""
        while self.cached and self.used_tokens + self.cached_tokens > self.cache_tokens:
            self._uncache(next(iter(self.cached)))

    def _uncache(self, conversation: int) -> int:
        """Removes a conversation from the prefix cache, and returns how many tokens of it there were."""
        num_tokens = self.cached.pop(conversation, 0)
        self.cached_tokens -= num_tokens
        return num_tokens


Router = Callable[[Sequence[Server], int, Request, random.Random], Server]
"""Chooses the server of a request with a number, in the order of arrival."""


def _random(servers: Sequence[Server], _: int, __: Request, chance: random.Random) -> Server:
    return chance.choice(servers)


def _round_robin(servers: Sequence[Server], number: int, _: Request, __: random.Random) -> Server:
    return servers[number % len(servers)]


def _least_of_two(servers: Sequence[Server], _: int, __: Request, chance: random.Random) -> Server:
    one, other = chance.choice(servers), chance.choice(servers)
    return min(one, other, key=lambda server: server.num_requests)


def _least(servers: Sequence[Server], _: int, __: Request, chance: random.Random) -> Server:
    return min(servers, key=lambda server: (server.num_requests, chance.random()))


ROUTERS: dict[str, Router] = {
    "random": _random,
    "in turns": _round_robin,
    "least of two, as Envoy": _least_of_two,
    "least of all, as one Python client or gateway": _least,
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
        server = router(servers, number, request, chance)
        server.waiting.append(request)
        if not server.is_busy:
            begin(servers.index(server), request.arrival_s)
    finish_steps(float("inf"))
