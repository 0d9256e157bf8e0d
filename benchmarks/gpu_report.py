"""Prints what `make bench-gpu` measured, beside its goals.

python -m benchmarks.gpu_report [build/bench]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Results = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """Something to reach on an H100 or H200."""

    what: str
    goal: float
    measured: Callable[[Results], float]
    """Raises KeyError or StopIteration if it was not measured."""
    unit: str = ""
    is_most: bool = False
    """Whether the goal is the most, rather than the least."""

    def cells(self, results: Results) -> tuple[str, ...]:
        goal = f"{'at most' if self.is_most else 'at least'} {self._text(self.goal)}"
        try:
            measured = self.measured(results)
        except (KeyError, StopIteration):
            return self.what, goal, "not measured", ""
        is_met = measured <= self.goal if self.is_most else measured >= self.goal
        return self.what, goal, self._text(measured), "yes" if is_met else "**no**"

    def _text(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "%" else f"{value:,.4g}{self.unit}"


def _share(num_sequences: int, tokens: int, attention: str) -> Callable[[Results], float]:
    wanted = {"weights": "16 bits", "attention": attention, "sequences": num_sequences, "tokens": tokens}

    def measured(results: Results) -> float:
        share: float = next(row["share"] for row in results["steps"] if wanted.items() <= row.items())
        return share

    return measured


def _largest_error(results: Results, kind: str) -> float:
    errors = [
        row["error"]
        for row in results["checks"]
        if kind in row and "bfloat16" not in row.get("dtype", "") and not row[kind].startswith("8 bits")
    ]
    if not errors:
        raise KeyError(kind)
    return max(errors)


GOALS = (
    Goal("error of attention in float16", 2e-3, lambda results: _largest_error(results, "backend"), is_most=True),
    Goal("error of products in 16 bits", 2e-3, lambda results: _largest_error(results, "product"), is_most=True),
    Goal("error of the logits of small models", 1e-2, lambda results: _largest_error(results, "model"), is_most=True),
    Goal("alone, decoding, of the read limit", 0.85, _share(1, 1, "triton, recorded"), "%"),
    Goal("64 sequences after 600 tokens, of the read limit", 0.7, _share(64, 1, "triton, recorded"), "%"),
    Goal("a prompt of 512 tokens, of the rate of products", 0.55, _share(1, 512, "triton"), "%"),
    Goal(
        "512 in, 64 out, 64 at once, served",
        3000,
        lambda results: results["served"]["64 at once"]["output_tokens_per_s"],
        " tokens/s",
    ),
    Goal(
        "time to first token, alone, served",
        25,
        lambda results: results["served"]["alone"]["ttft_ms"],
        " ms",
        is_most=True,
    ),
    Goal(
        "mixed lengths, to static batches of transformers",
        8,
        lambda results: (
            results["served"]["mixed lengths"]["output_tokens_per_s"] / results["transformers"]["mixed lengths"]
        ),
        " times",
    ),
    Goal(
        "64 at once, served to in process",
        0.95,
        lambda results: (
            results["served"]["64 at once"]["output_tokens_per_s"]
            / results["in process"]["64 at once"]["output_tokens_per_s"]
        ),
        "%",
    ),
)


def report(folder: Path) -> Iterator[str]:
    """Yields the lines of a table in Markdown, and what failed."""
    results: Results = {}
    for name in ("gpu.json", "gpu_serving.json"):
        if (folder / name).exists():
            results |= json.loads((folder / name).read_text(encoding="utf-8"))
    yield f"{results.get('device', 'nothing was measured')}, torch {results.get('torch', '-')}"
    for limits in results.get("limits", ()):
        if "bytes_per_s" in limits:
            read, computed = limits["bytes_per_s"] / 1e12, limits["operations_per_s"] / 1e12
            yield f"limits: {read:.2f} TB/s, {computed:.0f} TFLOP/s"
    yield "\n| what | goal | measured | reached |\n|---|---|---|---|"
    for goal in GOALS:
        yield f"| {' | '.join(goal.cells(results))} |"
    yield ""
    for what, value in results.get("transformers", {}).items():
        yield f"transformers, {what}: {value if isinstance(value, str) else f'{value:,.0f} output tokens/s'}"
    for name, rows in results.items():
        if isinstance(rows, list):
            yield from (f"failed: {name}: {row['failed']}" for row in rows if "failed" in row)
    for kind in ("failed", "left out"):
        yield from (f"{kind}: {part}: {why}" for part, why in results.get(kind, {}).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/bench"))
    print("\n".join(report(parser.parse_args().folder)))


if __name__ == "__main__":
    main()
