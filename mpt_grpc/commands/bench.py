"""`mpt-grpc bench`: measures the latency and the throughput of a server under load."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from random import Random

from rich.progress import Progress

from mpt_grpc import __version__
from mpt_grpc.bench import load, report
from mpt_grpc.bench.endpoint import Endpoint
from mpt_grpc.bench.grpc_endpoint import open_grpc
from mpt_grpc.bench.http_endpoint import open_http
from mpt_grpc.bench.load import Lengths, Load, PlannedRequest
from mpt_grpc.bench.metrics import Timeline
from mpt_grpc.bench.runner import run_load
from mpt_grpc.commands.connection import client_options
from mpt_grpc.commands.progress import make_progress
from mpt_grpc.errors import BenchmarkError
from mpt_grpc_client.targets import resolve_target

_LENGTHS = Lengths(64, 64)
_NUM_REQUESTS = 64
_CONCURRENCY = 8


def run(parsed: argparse.Namespace) -> None:
    """Prints the table and writes the files; after Ctrl-C, with the requests that have ended.

    Raises BenchmarkError, and MptGrpcError if the server cannot be reached over gRPC.
    """
    if parsed.plot and importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError("--plot requires matplotlib; install the extra 'bench' (see docs/install.md)")
    trace = load.read_trace(parsed.trace, parsed.num_requests) if parsed.trace else None
    asyncio.run(_measure(parsed, trace))


async def _measure(parsed: argparse.Namespace, trace: Sequence[PlannedRequest] | None) -> None:
    async with _opened(parsed) as endpoint:
        requests = _requests(parsed, trace, endpoint.max_context_tokens)
        measured: list[tuple[Load, list[Timeline]]] = [(planned, []) for planned in _loads(parsed, requests)]
        try:
            with make_progress() as progress:
                for planned, timelines in measured:
                    await run_load(endpoint, _warm_up(parsed, planned), lambda _: None)
                    await run_load(endpoint, planned, _recorder(planned, timelines, progress))
        finally:
            # Ctrl-C cancels this task; what has ended until then is reported.
            results = [
                report.result(planned, timelines, parsed.objective) for planned, timelines in measured if timelines
            ]
            if results:
                _write(parsed, endpoint, results)
    if failed := [result.load.name for result in results if not result.summary.num_completed]:
        raise BenchmarkError(f"no request succeeded: {', '.join(failed)}")


def _recorder(planned: Load, timelines: list[Timeline], progress: Progress) -> Callable[[Timeline], None]:
    bar = progress.add_task(planned.name, total=len(planned.requests))

    def record(timeline: Timeline) -> None:
        timelines.append(timeline)
        progress.advance(bar)

    return record


def _opened(parsed: argparse.Namespace) -> AbstractAsyncContextManager[Endpoint]:
    if parsed.url:
        return open_http(parsed.url, is_chat=parsed.chat)
    return open_grpc(parsed.target, **client_options(parsed))


def _requests(
    parsed: argparse.Namespace, trace: Sequence[PlannedRequest] | None, max_context_tokens: int | None
) -> Sequence[PlannedRequest]:
    """Returns the requests of each load. Raises BenchmarkError if they do not fit in the server's context."""
    if trace is not None:
        return trace if max_context_tokens is None else load.fit(trace, max_context_tokens)
    prompt, output = parsed.prompt_tokens or _LENGTHS, parsed.output_tokens or _LENGTHS
    if max_context_tokens is not None and prompt.max + output.max > max_context_tokens:
        raise BenchmarkError(
            f"--prompt-tokens: {prompt.max} prompt and {output.max} output tokens exceed the server's context of"
            f" {max_context_tokens}; reduce --prompt-tokens or --output-tokens"
        )
    return load.random_lengths(parsed.num_requests or _NUM_REQUESTS, prompt, output, Random(parsed.seed))


def _loads(parsed: argparse.Namespace, requests: Sequence[PlannedRequest]) -> list[Load]:
    if parsed.concurrency:
        return [load.closed_loop(requests, concurrency) for concurrency in parsed.concurrency]
    if parsed.trace:
        return [load.replay(requests, rate) for rate in parsed.rate or [None]]
    if parsed.rate:
        return [load.poisson(requests, rate, Random(parsed.seed)) for rate in parsed.rate]
    return [load.closed_loop(requests, _CONCURRENCY)]


def _warm_up(parsed: argparse.Namespace, planned: Load) -> Load:
    num = (planned.concurrency or _CONCURRENCY) if parsed.warm_up is None else parsed.warm_up
    return load.closed_loop(planned.requests[:num], num)


def _write(parsed: argparse.Namespace, endpoint: Endpoint, results: Sequence[report.Result]) -> None:
    server = parsed.url or resolve_target(parsed.target)
    if parsed.output:
        settings = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "server": server,
            "model": endpoint.model,
            "prompts": endpoint.prompts,
            "trace": str(parsed.trace) if parsed.trace else None,
            "seed": parsed.seed,
            "objective": parsed.objective,
        }
        parsed.output.write_text(json.dumps(report.as_json(settings, results), indent=1) + "\n", encoding="utf-8")
    if parsed.plot:
        from mpt_grpc.bench import plot  # imports matplotlib

        plot.save(results, parsed.plot)
    print(f"{endpoint.model} at {server}, prompts of random {endpoint.prompts}\n\n{report.table(results)}")
