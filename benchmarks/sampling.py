"""Measures the choice of tokens on a CPU: by the compiled kernels, and by PyTorch alone.

python benchmarks/sampling.py

The logits are random, with the vocabulary of MPT-7B. PyTorch's time is that of a CPU without kernels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from mpt_grpc.model.native import load_kernels
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.request import SamplingParameters
from mpt_grpc.step import SamplingInputs, SequenceStep

VOCAB_SIZE, PADDED_SIZE = 50_277, 50_432
OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {"temperature": 0.8, "min_p": 0.05},
)


def milliseconds(sampler: Sampler, num_rows: int, options: dict[str, Any], num_runs: int) -> float:
    """Returns the median time in which the sampler chooses a token for each row."""
    logits = 3 * torch.randn(num_rows, PADDED_SIZE, generator=torch.Generator().manual_seed(0))
    inputs = (SamplingInputs(SamplingParameters(seed=1, **options)),)
    steps = [SequenceStep(row, "", (1,), 8, (1,), inputs, output_position=row) for row in range(num_rows)]
    times = []
    for _ in range(num_runs + 1):
        start_s = time.perf_counter()
        sampler.sample(logits, steps)
        times.append(time.perf_counter() - start_s)
    return 1e3 * statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--runs", type=int, default=20)
    parsed = parser.parse_args()
    kernels = load_kernels()
    if kernels is None:
        raise SystemExit("there are no compiled kernels, or MPT_GRPC_ISA is none")
    kernels.set_threads(torch.get_num_threads())
    print(f"{kernels.instruction_set}, {torch.get_num_threads()} threads; ms for one token of each row")
    print("| options | rows | kernels | PyTorch |\n|---|---|---|---|")
    for options in OPTIONS:
        for num_rows in parsed.rows:
            samplers = (Sampler(VOCAB_SIZE, kernels), Sampler(VOCAB_SIZE))
            ours, theirs = (milliseconds(sampler, num_rows, options, parsed.runs) for sampler in samplers)
            name = ", ".join(f"{key} {value}" for key, value in options.items())
            print(f"| {name} | {num_rows} | {ours:.2f} | {theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
