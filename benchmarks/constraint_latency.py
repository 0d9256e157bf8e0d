"""Measures how long constrained requests wait for their first token, and how long their neighbours wait meanwhile.

mpt-grpc serve &
python benchmarks/constraint_latency.py
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence

from mpt_grpc_client import AsyncClient, JsonSchema

NUM_CALLERS, NUM_SCHEMAS, NUM_ROUNDS, NUM_STREAMS, NUM_NEW = 8, 80, 3, 8, 40
PROMPT = "Once upon a time"
_numbers = itertools.count(int(time.time()) * 1000)
"""Names that no earlier run on the same server has used."""


def one_field() -> JsonSchema:
    """Returns a new schema of an object with one field."""
    name = f"f{next(_numbers)}"
    return JsonSchema({"type": "object", "properties": {name: {"type": "string", "maxLength": 20}}, "required": [name]})


def large() -> JsonSchema:
    """Returns a new schema of about 6 KB: an array of objects with 40 fields of several kinds, some of them nested."""
    kinds = (
        {"type": "string", "maxLength": 40},
        {"type": "integer", "minimum": 0, "maximum": 1000},
        {"enum": ["red", "green", "blue"]},
        {"type": "array", "items": {"type": "number"}, "maxItems": 5},
        {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"id": {"type": "string", "format": "uuid"}}}]},
    )
    fields = {f"field_{next(_numbers)}": kinds[index % len(kinds)] for index in range(40)}
    item = {"type": "object", "properties": fields, "required": list(fields)[:20], "additionalProperties": False}
    return JsonSchema({"type": "array", "items": item, "minItems": 1})


async def first_token_ms(client: AsyncClient, schema: JsonSchema | None, max_new_tokens: int = 8) -> float:
    """Returns the time from the call to its first token."""
    start_s = time.perf_counter()
    elapsed_ms = 0.0
    async with client.stream(PROMPT, constraint=schema, max_new_tokens=max_new_tokens) as stream:
        async for _ in stream.deltas():
            elapsed_ms = elapsed_ms or (time.perf_counter() - start_s) * 1e3
    return elapsed_ms


async def in_rotation(client: AsyncClient, schemas: Sequence[JsonSchema]) -> list[float]:
    """Returns the times to the first token when several callers work through the schemas."""

    async def caller(remaining: Iterator[JsonSchema]) -> list[float]:
        return [await first_token_ms(client, schema) for schema in remaining]

    remaining = iter(schemas)
    return list(itertools.chain(*await asyncio.gather(*(caller(remaining) for _ in range(NUM_CALLERS)))))


async def beside_streams(client: AsyncClient, schemas: Sequence[JsonSchema | None]) -> tuple[list[float], list[float]]:
    """Returns the schemas' times to the first token, one after the other, and the gaps of plain streams meanwhile."""
    gaps: list[float] = []
    is_warm = asyncio.Event()

    async def plain() -> None:
        while True:
            async with client.stream(PROMPT, max_new_tokens=400, ignore_eos=True) as stream:
                last_s = None
                async for _ in stream.deltas():
                    now_s = time.perf_counter()
                    if last_s is not None:
                        gaps.append((now_s - last_s) * 1e3)
                    last_s = now_s
                    if len(gaps) > 20 * NUM_STREAMS:
                        is_warm.set()

    streams = [asyncio.create_task(plain()) for _ in range(NUM_STREAMS)]
    await is_warm.wait()
    gaps.clear()
    times = [await first_token_ms(client, schema) for schema in schemas]
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return times, gaps


def row(name: str, times: Sequence[float], gaps: Sequence[float] = ()) -> str:
    longest_gap = f"{max(gaps):.0f}" if gaps else ""
    return f"| {name} | {statistics.median(times):.0f} | {max(times):.0f} | {longest_gap} |"


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", default="localhost:50051")
    parsed = parser.parse_args()
    async with AsyncClient(parsed.target) as client:
        await first_token_ms(client, one_field())  # the first constraint of all prepares the vocabulary
        print("| schemas | TTFT ms, median | max | longest gap of a neighbour, ms |\n|---|---|---|---|")
        for name, make in (("one field", one_field), (f"{len(large().schema):,} bytes", large)):
            schemas = [make() for _ in range(NUM_SCHEMAS)]
            for number in range(1, NUM_ROUNDS + 1):
                times = await in_rotation(client, schemas)
                print(row(f"{name}, {NUM_SCHEMAS} by {NUM_CALLERS} callers, round {number}", times), flush=True)
        print(row(f"none, beside {NUM_STREAMS} streams", *await beside_streams(client, [None] * NUM_NEW)), flush=True)
        for name, make in (("one field", one_field), ("large", large)):
            measured = await beside_streams(client, [make() for _ in range(NUM_NEW)])
            print(row(f"{name}, each new, beside {NUM_STREAMS} streams", *measured), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
