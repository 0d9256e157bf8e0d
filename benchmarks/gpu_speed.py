"""Checks and measures the kernels and steps for GPUs on the card of this machine, in less than eight minutes.

python -m benchmarks.gpu_speed [--output build/bench/gpu.json] [--minutes 8]

It needs torch, triton, numpy and safetensors, but not the server's other libraries. The parts run in the order of the
list in `main`; their rows are written to the file as they come, until the time is over. Steps include sampling and the
transfer of the tokens to the host. `--device cpu` runs all parts with a tiny model, to try the program.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_checks import check_attention, check_models, check_products
from benchmarks.gpu_machine import Machine, Rows, Spans, attention_of, linear_of, plan_of
from benchmarks.gpu_plan import MPT_7B, Limits, step_cost
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.linear import Linear, WeightFormat
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.model.weights import random_model
from mpt_grpc.step import StepPlan

_TINY = {**MPT_7B, "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96}


def measure_limits(machine: Machine) -> Rows:
    """Copies memory and multiplies matrices."""
    num_bytes, size = (4 << 30, 8192) if machine.is_gpu else (64 << 20, 512)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=machine.device).random_()
    target = torch.empty_like(source)
    copying_s = machine.seconds(lambda: target.copy_(source))
    matrix = torch.randn(size, size, device=machine.device).to(machine.dtype)
    multiplying_s = machine.seconds(lambda: matrix @ matrix)
    yield asdict(Limits(2 * num_bytes / copying_s, 2 * size**3 / multiplying_s))


def measure_products(machine: Machine) -> Rows:
    """Measures products with the largest matrix of a layer."""
    d_in, d_out = machine.config.d_model, 4 * machine.config.d_model
    weight = torch.randn(d_out, d_in, device=machine.device).to(machine.dtype)
    for name, weight_format in machine.weight_formats():
        # Several copies, so that none is in the card's cache when its turn comes.
        layers = [linear_of(weight, weight_format) for _ in range(8)]
        for num_rows in (1, 16, 64, 512):
            x = torch.randn(num_rows, d_in, device=machine.device).to(machine.dtype)
            seconds = machine.seconds(partial(_call_all, layers, x)) / len(layers)
            num_bytes = weight.numel() * weight_format.stored_dtype.itemsize
            speed = {"bytes_per_s": num_bytes / seconds, "operations_per_s": 2 * num_rows * weight.numel() / seconds}
            yield {"product": name, "rows": num_rows, "ms": 1000 * seconds, **speed}


def measure_attention(machine: Machine) -> Rows:
    """Measures one layer's attention: many sequences that decode, one that does, and a chunk."""
    lengths = (512, 2048, 8192) if machine.is_gpu else (64,)
    cases: list[Spans] = [*(([(n, 1)] * count) for count in (1, 16, 64) for n in lengths), [(0, 512)], [(1536, 512)]]
    for spans in cases:
        cache, attend_of, inputs = attention_of(machine, spans, machine.dtype)
        num_bytes = sum(map(sum, spans)) * 2 * cache.keys[0, 0, :, 0].numel() * cache.keys.itemsize
        for name, backend in machine.backends(machine.config):
            seconds = machine.seconds(partial(attend_of(backend), 0, *inputs))
            row = {"backend": name, "sequences": len(spans), "context": spans[0][0], "tokens": spans[0][1]}
            yield {**row, "ms": 1000 * seconds, "cache_bytes_per_s": num_bytes / seconds}


def measure_steps(machine: Machine, limits: Limits) -> Rows:
    """Measures steps that decode, and one with a chunk, of a model with random weights."""
    for name, weight_format in machine.weight_formats():
        for row in _measure_steps(machine, limits, weight_format):
            yield {"weights": name, **row}


def _measure_steps(machine: Machine, limits: Limits, weight_format: WeightFormat) -> Rows:
    config = machine.config
    model = random_model(config, weight_format)
    cases: list[tuple[int, int, int]] = [*((n, 600, 1) for n in (1, 64, 16)), (1, 0, 512)]
    for num_sequences, context, tokens in cases:
        spans = [(context, tokens)] * num_sequences
        decodes = tokens == 1
        cost = step_cost(config, num_sequences if decodes else 0, context, chunk=0 if decodes else tokens)
        if weight_format.quantize:
            cost = replace(cost, weight_bytes=cost.weight_bytes // 2)
        for name, runner in machine.runners(model, spans):
            plan, sampler = plan_of(spans), Sampler(config.vocab_size)

            def step(runner: Runner = runner, plan: StepPlan = plan, sampler: Sampler = sampler) -> None:
                output = runner.run(plan)
                sampler.sample(output.logits, plan.sequences, are_finite=output.are_finite)

            seconds = machine.seconds(step)
            row = {"attention": name, "sequences": num_sequences, "context": context, "tokens": tokens}
            limit_ms = 1000 * cost.seconds(limits)
            yield {**row, "ms": 1000 * seconds, "limit_ms": limit_ms, "share": limit_ms / (1000 * seconds)}


def _call_all(layers: Sequence[Linear], x: Tensor) -> None:
    for layer in layers:
        layer(x)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/bench/gpu.json"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parsed = parser.parse_args(arguments)
    end_s = time.monotonic() + 60 * parsed.minutes
    is_gpu = parsed.device == "cuda"
    machine = Machine(
        torch.device(parsed.device),
        MPTConfig.from_dict(MPT_7B if is_gpu else _TINY),
        torch.float16 if is_gpu else torch.float32,
    )
    report: dict[str, Any] = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if is_gpu else "cpu"}
    parts: tuple[tuple[str, Callable[[], Rows]], ...] = (
        ("limits", lambda: measure_limits(machine)),
        ("checks", lambda: chain(check_attention(machine), check_products(machine), check_models(machine))),
        ("steps", lambda: measure_steps(machine, Limits(**report["limits"][0]))),
        ("products", lambda: measure_products(machine)),
        ("attention", lambda: measure_attention(machine)),
    )
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    for name, measure in parts:
        rows = report.setdefault(name, [])
        try:
            for row in takewhile(lambda _: time.monotonic() < end_s, measure()):
                rows.append(row)
                print(name, json.dumps(row), flush=True)
                parsed.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
        except Exception as error:  # such as a card with too little memory: the other parts are still worth running
            rows.append({"failed": repr(error)})
            print(name, json.dumps(rows[-1]), flush=True)
        parsed.output.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
