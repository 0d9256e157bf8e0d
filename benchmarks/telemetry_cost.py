"""Measures what traces of all requests cost: two servers in turn, of which one exports its spans over OTLP.

    python -m benchmarks.telemetry_cost --model FOLDER

The collector, which only counts spans, and the client run in this process, on the cores of the servers. Needs Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import truediv
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from benchmarks.peers.drivers.ours import served
from mpt_grpc_client import AsyncClient

_NUM_STREAMS, _NUM_REQUESTS, _NEW_TOKENS = 16, 64, 64
_NUM_TOKENS = _NUM_REQUESTS * _NEW_TOKENS
_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
    num_spans = 0

    def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802
        self.num_spans += sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def _collecting() -> Iterator[_Collector]:
    """Has servers that start in the block export spans to a collector."""
    server, collector = grpc.server(ThreadPoolExecutor(1)), _Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    os.environ[_ENDPOINT] = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        del os.environ[_ENDPOINT]
        server.stop(None)


@dataclass
class _Server:
    client: AsyncClient
    pid: int
    tokens_per_s: list[float] = field(default_factory=list)
    processor_ms: list[float] = field(default_factory=list)
    """The processor time of the server, for 1,000 tokens."""

    async def measure(self) -> None:
        start_s, processor_s = perf_counter(), _processor_s(self.pid)
        await _generate(self.client)
        self.tokens_per_s.append(_NUM_TOKENS / (perf_counter() - start_s))
        self.processor_ms.append((_processor_s(self.pid) - processor_s) / _NUM_TOKENS * 1e6)


@contextmanager
def _server(model: str) -> Iterator[tuple[str, int]]:
    """Yields the target and the process ID of a server."""
    before = _children()
    with served("--model", model) as target:
        (pid,) = _children() - before
        yield target, pid


async def _compare(plain: tuple[str, int], traced: tuple[str, int], rounds: int) -> None:
    async with AsyncClient(plain[0], timeout=600) as one, AsyncClient(traced[0], timeout=600) as other:
        servers = (_Server(one, plain[1]), _Server(other, traced[1]))
        for client in (one, other):
            await _generate(client)  # a warm-up
        for number in range(rounds):
            for server in servers[:: -1 if number % 2 else 1]:
                await server.measure()
    for what, unit, digits in (
        ("tokens_per_s", "tokens/s", 0),
        ("processor_ms", "ms of processor time for 1,000 tokens", 1),
    ):
        without, with_spans = (getattr(server, what) for server in servers)
        lower, middle, upper = quantiles(map(truediv, with_spans, without), n=4)
        print(
            f"{median(without):,.{digits}f} {unit} without spans, {median(with_spans):,.{digits}f} with all;", end=" "
        )
        print(f"ratio {middle:.3f}, half of {rounds} rounds between {lower:.3f} and {upper:.3f}")


async def _generate(client: AsyncClient) -> None:
    prompts = iter(f"Once upon a time there were {number} foxes" for number in range(_NUM_REQUESTS))

    async def read() -> None:
        for prompt in prompts:
            async with client.stream(prompt, temperature=0, max_new_tokens=_NEW_TOKENS, ignore_eos=True) as stream:
                async for _ in stream:
                    pass

    await asyncio.gather(*(read() for _ in range(_NUM_STREAMS)))


def _children() -> set[int]:
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


def _processor_s(pid: int) -> float:
    """Returns the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints what traces of all requests cost.")
    parser.add_argument("--model", required=True, help="the folder of a checkpoint")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with _server(arguments.model) as plain, _collecting() as collector, _server(arguments.model) as traced:
        asyncio.run(_compare(plain, traced, arguments.rounds))
    print(f"{collector.num_spans:,} spans were collected")
