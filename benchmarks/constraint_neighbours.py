"""Measures how constrained requests slow down unconstrained ones: the time between tokens of plain streams.

    python benchmarks/constraint_neighbours.py

Four plain requests stream on the demo model while other threads send constrained requests one after the other: first
with ordinary constraints, then with ones designed to be costly to compile or to enforce.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence

from mpt_grpc.constraint import Choice, Constraint, JsonSchema, LarkGrammar, Regex
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.load import load_engine
from mpt_grpc.errors import MptServerError
from mpt_grpc.request import DecodingOptions, GenerationRequest, SamplingParameters, StoppingCriteria
from mpt_grpc.settings import Settings

NUM_PLAIN, NUM_TOKENS, NUM_NEIGHBOURS = 4, 300, 2
ORDINARY: tuple[Constraint, ...] = (
    JsonSchema('{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}'),
    Regex(r"[A-Z][a-z]+ [0-9]{3}-[0-9]{4}"),
    Choice(("the fox", "the crow", "the king")),
)


def costly(number: int) -> Constraint:
    """Returns a constraint that costs about as much as the server allows; no two are the same, so none is cached."""
    return (
        Regex(f"(a{{1,{900 + number % 99}}}){{1,1000}}"),
        LarkGrammar(f'start: e\ne: e e | "a" | "b{number}"'),
        Regex("|".join(f"{number}{word:05d}.*{word}" for word in range(3000))),
        JsonSchema(f'{{"type": "string", "pattern": "^(x+x+)+y{number}$", "minLength": 5, "maxLength": 5000}}'),
    )[number % 4]


def gaps_ms(engine: Engine, make_constraint: Callable[[int], Constraint | None] | None) -> list[float]:
    """Returns the times between tokens of the plain streams.

    Meanwhile other threads send requests with the constraints that `make_constraint` returns, or none if it is None.
    """
    done = threading.Event()

    def plain(number: int) -> None:
        stopping = StoppingCriteria(max_new_tokens=NUM_TOKENS, ignore_eos=True)
        last_s = None
        for _ in engine.stream(GenerationRequest(f"plain {number}", "Once upon a time", stopping=stopping)):
            now_s = time.perf_counter()
            if last_s is not None:
                gaps.append((now_s - last_s) * 1e3)
            last_s = now_s

    def constrained(number: int) -> None:
        while not done.is_set() and make_constraint is not None:
            request = GenerationRequest(
                f"constrained {number}",
                "Once upon a time",
                SamplingParameters(seed=number),
                decoding=DecodingOptions(constraint=make_constraint(number)),
                stopping=StoppingCriteria(max_new_tokens=40),
            )
            try:
                engine.generate(request)
            except MptServerError:
                failed.append(number)
            number += NUM_NEIGHBOURS

    gaps: list[float] = []
    failed: list[int] = []
    streams = [threading.Thread(target=plain, args=(number,)) for number in range(NUM_PLAIN)]
    others = [threading.Thread(target=constrained, args=(number,)) for number in range(NUM_NEIGHBOURS)]
    for thread in (*streams, *others):
        thread.start()
    for thread in streams:
        thread.join()
    done.set()
    for thread in others:
        thread.join()
    return gaps


def row(name: str, gaps: Sequence[float]) -> str:
    percentiles = statistics.quantiles(gaps, n=100)
    return f"| {name} | {percentiles[49]:.1f} | {percentiles[98]:.1f} | {max(gaps):.0f} |"


def main() -> None:
    engine, model = load_engine(Settings())
    print(f"{model.name}, {model.dtype}, {model.device}; ms between tokens of {NUM_PLAIN} plain streams\n")
    print("| concurrent load | p50 | p99 | max |\n|---|---|---|---|")
    with engine:
        gaps_ms(engine, None)
        print(row("none", gaps_ms(engine, None)), flush=True)
        print(row(f"{NUM_NEIGHBOURS} short plain requests", gaps_ms(engine, lambda _: None)), flush=True)
        ordinary = gaps_ms(engine, lambda number: ORDINARY[number % len(ORDINARY)])
        print(row(f"{NUM_NEIGHBOURS} requests with ordinary constraints", ordinary), flush=True)
        print(row(f"{NUM_NEIGHBOURS} requests with costly constraints", gaps_ms(engine, costly)), flush=True)


if __name__ == "__main__":
    main()
