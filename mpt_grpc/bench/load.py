"""The plan of a load: when each request starts and how long its prompt and its output are. Random from a seed."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from random import Random

from mpt_grpc.errors import BenchmarkError

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class PlannedRequest:
    """A request to send."""

    start_s: float
    """When it starts, in seconds after the load does; at the earliest, in a closed loop."""
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True)
class Load:
    """Requests that are measured together."""

    name: str
    """What distinguishes this load, such as `8 at once`."""
    requests: tuple[PlannedRequest, ...]
    concurrency: int | None
    """The number of requests in progress in a closed loop; None in an open loop, where requests do not wait."""


@dataclass(frozen=True)
class Lengths:
    """A uniform distribution of numbers of tokens, both ends included."""

    min: int
    max: int


def random_lengths(num: int, prompt: Lengths, output: Lengths, random: Random) -> tuple[PlannedRequest, ...]:
    """Returns `num` requests that start at once, with lengths from the two distributions."""
    return tuple(
        PlannedRequest(0, random.randint(prompt.min, prompt.max), random.randint(output.min, output.max))
        for _ in range(num)
    )


def read_trace(file: Path, num: int | None) -> tuple[PlannedRequest, ...]:
    """Returns the first `num` requests of a trace, or all, the first of which starts at 0.

    The format is that of the Azure LLM inference traces: CSV with the columns TIMESTAMP (ISO 8601), ContextTokens and
    GeneratedTokens. Raises BenchmarkError.
    """
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = [tuple(row[column] for column in _COLUMNS) for row in itertools.islice(csv.DictReader(lines), num)]
        times = [_seconds(time) for time, _, _ in rows]
        lengths = [(max(int(prompt), 1), max(int(output), 1)) for _, prompt, output in rows]
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"--trace: cannot read {file}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BenchmarkError(f"--trace: {file} is not CSV with the columns {', '.join(_COLUMNS)}: {error}") from error
    if not rows:
        raise BenchmarkError(f"--trace: {file} has no requests")
    return tuple(PlannedRequest(time - min(times), *pair) for time, pair in sorted(zip(times, lengths, strict=True)))


def _seconds(time: str) -> float:
    # The traces have seven digits of a second, which fromisoformat accepts and cuts to six.
    return datetime.fromisoformat(time).timestamp()


def fit(requests: Sequence[PlannedRequest], max_context_tokens: int) -> tuple[PlannedRequest, ...]:
    """Scales all lengths by one factor, at most 1, so that the longest request fits in the context."""
    longest = max(request.num_prompt_tokens + request.num_output_tokens for request in requests)
    # Two tokens of room: each length is at least 1, whatever the factor.
    factor = min(1, (max_context_tokens - 2) / longest) if longest > max_context_tokens else 1
    return tuple(
        replace(
            request,
            num_prompt_tokens=max(int(request.num_prompt_tokens * factor), 1),
            num_output_tokens=max(int(request.num_output_tokens * factor), 1),
        )
        for request in requests
    )


def closed_loop(requests: Sequence[PlannedRequest], concurrency: int) -> Load:
    """Returns a load in which a request starts when another ends, so that `concurrency` are in progress."""
    started_at_once = tuple(replace(request, start_s=0) for request in requests)
    return Load(f"{concurrency} at once", started_at_once, concurrency)


def poisson(requests: Sequence[PlannedRequest], rate: float, random: Random) -> Load:
    """Returns a load of `rate` requests a second, with exponential times between them."""

    def times() -> Iterator[float]:
        time_s = 0.0
        while True:
            yield time_s
            time_s += random.expovariate(rate)

    arrivals = tuple(replace(request, start_s=time_s) for request, time_s in zip(requests, times(), strict=False))
    return Load(f"{rate:g}/s", arrivals, None)


def replay(requests: Sequence[PlannedRequest], rate: float | None) -> Load:
    """Returns a load with the times of a trace, stretched to `rate` requests a second unless that is None."""
    if rate is None:
        return Load("trace", tuple(requests), None)
    last_s = requests[-1].start_s
    factor = (len(requests) - 1) / rate / last_s if last_s else 0
    return Load(f"{rate:g}/s", tuple(replace(request, start_s=request.start_s * factor) for request in requests), None)
