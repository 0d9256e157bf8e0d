"""Breaks servers in the middle of many streams, and compares what their readers got with the undisturbed outputs.

Three servers serve the built-in model. In each round two of them fail, one after the other, at random moments while 30
streams with every kind of option are in progress; then they are started again. Prints a table of the faults: how often
each was tried, how many outputs differ, and how long readers waited for the next token. Exits with status 1 if an
output differs or a stream failed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from mpt_grpc_client import (
    AsyncClient,
    Generation,
    JsonSchema,
    Message,
    Prompt,
    Regex,
    RepetitionGuard,
    Role,
    Timings,
)

NUM_SERVERS, NUM_FAILING = 3, 2
FLAGS = ((), ("--speculate", "ngram"), ("--max-step-tokens", "100"))
MAX_NEW_TOKENS = 48
TIMEOUT_S = 120


class Fault(NamedTuple):
    """A way to fail."""

    name: str
    description: str
    signal: signal.Signals


FAULTS = (
    Fault("kill", "the process is killed (SIGKILL)", signal.SIGKILL),
    Fault("drain", "it is stopped, with no grace period (SIGTERM)", signal.SIGTERM),
    Fault("freeze", "its machine freezes (SIGSTOP)", signal.SIGSTOP),
)
PROMPTS: Sequence[Prompt] = (
    "Once upon a time there was a fox",
    [Message(Role.SYSTEM, "Be kind."), Message(Role.USER, "Tell me about the moon.")],
)
LOGPROBS = {"return_logprobs": True, "top_logprobs": 3, "return_prompt_logprobs": True}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 20, "maxLength": 40}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
KINDS: Sequence[Mapping[str, Any]] = (
    {"temperature": 0},
    {"top_k": 200, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    {"return_token_ids": True, "return_prompt_token_ids": True, **LOGPROBS},
    {"logit_bias": {50: 5.0, 60: -100.0}, "chunk_tokens": 7},
    {"allowed_token_ids": range(130, 250)},  # most are parts of characters
    {"stop_strings": [" the fox and", "the k"], "include_stop_string": True, "min_new_tokens": 30},
    {"stop_strings": ["\n\n\n", "zebra"]},
    {"stop_token_ids": range(64), "min_new_tokens": 40},
    {"repetition_guard": RepetitionGuard(20, 4), "temperature": 0},
    {"constraint": JsonSchema(PERSON), "ignore_eos": None},
    {"constraint": Regex("[a-z]{30,60}( [0-9]{8})+"), "ignore_eos": None},
    {"num_sequences": 4, "ignore_eos": None, **LOGPROBS},
    {"num_sequences": 2, "constraint": JsonSchema(PERSON), "ignore_eos": None},
    {"resume_token_ids": [50, 60, 70], "skip_special_tokens": False, "cache_bypass": True},
)


@dataclass
class Tally:
    """What happened under one fault."""

    num_rounds: int = 0
    num_streams: int = 0
    num_lost: int = 0
    """Streams that failed or differ."""
    pauses_s: list[float] = field(default_factory=list)
    """How long a reader waited for the first delta from another server, for each time that one continued."""


class ServerProcess:
    """One of the servers, which is started again at the same port."""

    def __init__(self, *flags: str) -> None:
        self.port, self._flags = 0, flags
        self.start()

    def start(self) -> None:
        self.has_failed = False
        command = (
            "serve",
            "--grpc-port",
            str(self.port),
            "--no-http",
            "--kv-cache",
            "256MiB",
            "--grace",
            "0s",
            *self._flags,
        )
        self.process = subprocess.Popen(
            (sys.executable, "-m", "mpt_grpc", *command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if address := re.match(r"\s+gRPC\s+\S+:(\d+)", line):
                self.port = int(address[1])
                return
        raise SystemExit(f"a server did not start: status {self.process.wait()}")

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def fail(self, fault: Fault) -> None:
        self.has_failed = True
        self.process.send_signal(fault.signal)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def request(number: int) -> tuple[Prompt, dict[str, Any]]:
    """Returns the prompt and the options of a stream."""
    options = {"max_new_tokens": MAX_NEW_TOKENS, "ignore_eos": True, "seed": number, **KINDS[number % len(KINDS)]}
    return PROMPTS[number // len(KINDS) % len(PROMPTS)], options


def essence(generation: Generation) -> Generation:
    """Returns what must not differ: all but IDs, times and what the prefix cache had."""
    usage = replace(generation.usage, num_cached_tokens=0, num_preemptions=0)
    timings = Timings(None, None, None, None)
    return replace(generation, request_id="", trace_id="", usage=usage, timings=timings, resumptions=())


async def read(client: AsyncClient, number: int, tally: Tally, on_delta: Callable[[], None]) -> Generation:
    """Returns a stream's result, and adds the reader's pauses to the tally."""
    prompt, options = request(number)
    stream, last_s, num_resumptions = client.stream(prompt, **options), time.monotonic(), 0
    async for _ in stream.deltas():
        on_delta()
        now_s = time.monotonic()
        if len(stream.resumptions) > num_resumptions:
            num_resumptions += 1
            tally.pauses_s.append(now_s - last_s)
        last_s = now_s
    return stream.result


async def run_round(
    servers: Sequence[ServerProcess], fault: Fault, expected: Sequence[Generation], tally: Tally
) -> None:
    """Has two servers fail while the streams are read, and compares these."""
    restart_failed(servers)
    failing = random.sample(servers, NUM_FAILING)
    # In deltas of all streams together, of which the third server has many to send.
    moments = sorted(random.sample(range(1, len(expected) * MAX_NEW_TOKENS // 2), NUM_FAILING))
    num_deltas = itertools.count(1)

    def on_delta() -> None:
        if (number := next(num_deltas)) in moments:
            failing[moments.index(number)].fail(fault)

    async with AsyncClient([server.target for server in servers], timeout=TIMEOUT_S) as client:
        streams = (read(client, number, tally, on_delta) for number in range(len(expected)))
        results = await asyncio.gather(*streams, return_exceptions=True)
    for number, (result, undisturbed) in enumerate(zip(results, expected, strict=True)):
        if isinstance(result, BaseException) or essence(result) != undisturbed:
            tally.num_lost += 1
            print(f"{fault.name}: stream {number} with {KINDS[number % len(KINDS)]}: {result!r}", file=sys.stderr)
    tally.num_rounds += 1
    tally.num_streams += len(expected)


def restart_failed(servers: Sequence[ServerProcess]) -> None:
    """Starts the servers that have failed again, side by side, and waits until they are ready."""
    failed = [server for server in servers if server.has_failed]
    for server in failed:
        server.kill()
        server.start()
    for server in failed:
        server.wait_until_ready()


async def undisturbed(server: ServerProcess, num_streams: int) -> list[Generation]:
    """Returns what the streams are without a fault."""
    async with AsyncClient(server.target, timeout=TIMEOUT_S) as client:
        requests = map(request, range(num_streams))
        whole = await asyncio.gather(*(client.generate(prompt, **options) for prompt, options in requests))
    return [essence(generation) for generation in whole]


async def torture(faults: Sequence[Fault], num_rounds: int, num_streams: int) -> dict[Fault, Tally]:
    """Runs the rounds, each of which tries every fault."""
    # They need not be alike in what does not change tokens.
    servers = [ServerProcess(*FLAGS[number % len(FLAGS)]) for number in range(NUM_SERVERS)]
    try:
        for server in servers:
            server.wait_until_ready()
        expected = await undisturbed(servers[0], num_streams)
        tallies = {fault: Tally() for fault in faults}
        for _ in range(num_rounds):
            for fault, tally in tallies.items():
                await run_round(servers, fault, expected, tally)
        return tallies
    finally:
        for server in servers:
            server.kill()


def table(tallies: Mapping[Fault, Tally]) -> str:
    """Returns one line for each fault."""
    lines: list[tuple[str, ...]] = [("fault", "rounds", "streams", "continued", "lost", "pause: median", "longest")]
    for fault, tally in tallies.items():
        pauses_s = sorted(tally.pauses_s) or [0.0]
        pauses = (f"{pauses_s[len(pauses_s) // 2]:.2f} s", f"{pauses_s[-1]:.2f} s")
        counts = map(str, (tally.num_rounds, tally.num_streams, len(tally.pauses_s), tally.num_lost))
        lines.append((fault.description, *counts, *pauses))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each fault is tried (default: 5)")
    parser.add_argument("--streams", type=int, default=30, help="streams in progress at once (default: 30)")
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--faults", nargs="+", choices=names, default=names, help="the faults (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the faults (default: 0)")
    parsed = parser.parse_args()
    random.seed(parsed.seed)
    faults = [fault for fault in FAULTS if fault.name in parsed.faults]
    tallies = asyncio.run(torture(faults, parsed.rounds, parsed.streams))
    print(table(tallies))
    return int(any(tally.num_lost for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
