"""Breaks and overloads servers in the middle of many streams, and compares what was read with the undisturbed outputs.

Three servers serve the built-in model. In each round two of them fail, one after the other, at random moments while 30
streams with every kind of option are in progress. Then one server is loaded in ways that it must survive. Prints a
table: how often each fault and load was tried, how many outputs were lost, and how long the recovery took. Exits with
status 1 if an output differs or a call ended in a way that it must not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from mpt_grpc_client import AsyncClient, Generation
from tools import loads
from tools.relay import relaying
from tools.streams import KINDS, MAX_NEW_TOKENS, TIMEOUT_S, ServerProcess, Tally, essence, read, undisturbed

NUM_SERVERS, NUM_FAILING = 3, 2
FLAGS = ((), ("--speculate", "ngram"), ("--max-step-tokens", "100"))
HANG_S = 2.0


@dataclass(frozen=True)
class Fault:
    """A way to fail: by a signal, by the network, or from the start by what the server is started with."""

    name: str
    description: str
    signal: signal.Signals | None = None
    is_temporary: bool = False
    """Whether the process goes on after `HANG_S`."""
    flags: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def is_from_start(self) -> bool:
        return bool(self.flags or self.variables)


FAULTS = (
    Fault("kill", "the process is killed (SIGKILL)", signal.SIGKILL),
    Fault("drain", "it is stopped, with no grace period (SIGTERM)", signal.SIGTERM),
    Fault("reset", "its connections are reset"),
    Fault("freeze", "its machine freezes (SIGSTOP)", signal.SIGSTOP),
    Fault("hang", f"it hangs for {HANG_S:.0f} s (SIGSTOP, SIGCONT)", signal.SIGSTOP, is_temporary=True),
    Fault("disk", "the disk under its trace file is full", flags=("--trace-file", "/dev/full")),
    Fault("collector", "its collector is dead", variables={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}),
)


async def run_round(
    servers: Sequence[ServerProcess], fault: Fault, expected: Sequence[Generation], tally: Tally
) -> Sequence[ServerProcess]:
    """Has two servers fail while the streams are read, and compares these. Returns the servers to start again."""
    failing = random.sample(servers, NUM_FAILING)
    if fault.is_from_start:
        restart(failing, *fault.flags, **fault.variables)
    # In deltas of all streams together, of which the third server has many to send.
    moments = sorted(random.sample(range(1, len(expected) * MAX_NEW_TOKENS // 2), NUM_FAILING))
    num_deltas = itertools.count(1)

    async with AsyncExitStack() as stack:
        targets = {server: server.target for server in servers}
        relays = {}
        if fault.name == "reset":
            relays = {server: await stack.enter_async_context(relaying(server.target)) for server in servers}
            targets = {server: relay.target for server, relay in relays.items()}

        def on_delta() -> None:
            if (number := next(num_deltas)) not in moments:
                return
            server = failing[moments.index(number)]
            if relays:
                relays[server].cut()
            elif fault.signal is not None:
                server.process.send_signal(fault.signal)
                if fault.is_temporary:
                    asyncio.get_running_loop().call_later(HANG_S, server.process.send_signal, signal.SIGCONT)

        client = await stack.enter_async_context(AsyncClient(list(targets.values()), timeout=TIMEOUT_S))
        streams = (read(client, number, tally, on_delta) for number in range(len(expected)))
        results = await asyncio.gather(*streams, return_exceptions=True)
    for number, (result, whole) in enumerate(zip(results, expected, strict=True)):
        if isinstance(result, BaseException) or essence(result) != whole:
            tally.num_lost += 1
            print(f"{fault.name}: stream {number} with {KINDS[number % len(KINDS)]}: {result!r}", file=sys.stderr)
    tally.num_rounds += 1
    tally.num_calls += len(expected)
    return () if fault.name == "reset" else failing


def restart(servers: Sequence[ServerProcess], *flags: str, **variables: str) -> None:
    """Starts servers again, side by side, and waits until they are ready."""
    for server in servers:
        server.kill()
        server.start(*flags, **variables)
    for server in servers:
        server.wait_until_ready()


async def run_faults(faults: Sequence[Fault], num_rounds: int, num_streams: int) -> dict[str, Tally]:
    """Runs the rounds, each of which tries every fault."""
    # They need not be alike in what does not change tokens.
    servers = [ServerProcess(*FLAGS[number % len(FLAGS)]) for number in range(NUM_SERVERS)]
    try:
        for server in servers:
            server.wait_until_ready()
        async with AsyncClient(servers[0].target, timeout=TIMEOUT_S) as client:
            expected = await undisturbed(client, num_streams)
        tallies = {fault.description: Tally() for fault in faults}
        failed: Sequence[ServerProcess] = ()
        for _ in range(num_rounds):
            for fault in faults:
                restart(failed)
                failed = await run_round(servers, fault, expected, tallies[fault.description])
        return tallies
    finally:
        for server in servers:
            server.kill()


def table(tallies: Mapping[str, Tally]) -> str:
    """Returns one line of Markdown for each fault and load."""
    lines: list[tuple[str, ...]] = [("Fault or load", "Rounds", "Calls", "Lost", "Recoveries", "Median", "Longest")]
    lines.append(("---",) * len(lines[0]))
    for description, tally in tallies.items():
        pauses_s = sorted(tally.pauses_s)
        pauses = (f"{pauses_s[len(pauses_s) // 2]:.2f} s", f"{pauses_s[-1]:.2f} s") if pauses_s else ("", "")
        counts = map(str, (tally.num_rounds, tally.num_calls, tally.num_lost, len(pauses_s)))
        lines.append((description, *counts, *pauses))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is tried (default: 5)")
    parser.add_argument("--streams", type=int, default=30, help="streams in progress at once (default: 30)")
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--faults", nargs="*", choices=names, default=names, help="the faults (default: all)")
    parser.add_argument(
        "--loads", nargs="*", choices=loads.LOADS, default=[*loads.LOADS], help="the loads (default: all)"
    )
    parser.add_argument("--cancels", type=int, default=10_000, help="of a round of the load cancel (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the faults (default: 0)")
    parsed = parser.parse_args()
    random.seed(parsed.seed)
    tallies: dict[str, Tally] = {}
    if faults := [fault for fault in FAULTS if fault.name in parsed.faults]:
        tallies |= asyncio.run(run_faults(faults, parsed.rounds, parsed.streams))
    if parsed.loads:
        tallies |= asyncio.run(loads.run_loads(parsed.loads, parsed.rounds, parsed.streams, parsed.cancels))
    print(table(tallies))
    return int(any(tally.num_lost for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
