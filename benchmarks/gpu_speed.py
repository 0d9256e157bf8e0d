"""Checks and measures the kernels and steps for GPUs on the card of this machine, in less than eight minutes.

python -m benchmarks.gpu_speed [--output build/bench/gpu.json] [--minutes 8]

It needs torch, triton, numpy and safetensors, but not the server's other libraries. The parts run in the order of the
list in `main`; their rows are written to the file as they come, until the time is over. Steps include sampling and the
transfer of the tokens to the host. `--device cpu` runs all parts with a tiny model, to try the program.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_plan import MPT_7B, Limits, step_cost
from mpt_grpc.model.attention import AttentionBackend, MetadataBuilder
from mpt_grpc.model.attention.torch_backend import TorchAttention
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.graphs import CudaRecorder
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.linear import Linear, WeightFormat
from mpt_grpc.model.mpt import MPT
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.model.weights import random_model
from mpt_grpc.request import SamplingParameters
from mpt_grpc.step import SamplingInputs, SequenceStep, StepPlan

BLOCK_SIZE = 16
_TINY = {**MPT_7B, "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96}
Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Machine:
    """Where the parts run, and with what model."""

    device: torch.device
    config: MPTConfig
    dtype: torch.dtype

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def one_layer(self) -> MPTConfig:
        return replace(self.config, n_layers=1)

    def backends(self, config: MPTConfig) -> Iterator[tuple[str, AttentionBackend]]:
        yield "torch", TorchAttention(config, self.device)
        if self.is_gpu:
            from mpt_grpc.model.attention.triton_backend import TritonAttention

            yield "triton", TritonAttention(config, self.device)
            yield "triton, batch-invariant", TritonAttention(config, self.device, batch_invariant=True)

    def weight_formats(self) -> Iterator[tuple[str, WeightFormat]]:
        """Yields what multiplies, and the form of the weights."""
        common = partial(WeightFormat, self.dtype, self.device, by_triton=self.is_gpu)
        yield "16 bits", common()
        yield "8 bits", common(quantize=True)
        yield "16 bits, batch-invariant", common(batch_invariant=True)

    def seconds(self, work: Callable[[], object], repeats: int = 20) -> float:
        """Returns the median time of `work`, after three runs that do not count."""
        times = []
        for number in range(3 + repeats):
            self._wait()
            start_s = time.perf_counter()
            work()
            self._wait()
            if number >= 3:
                times.append(time.perf_counter() - start_s)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()


def measure_limits(machine: Machine) -> Rows:
    """Copies memory and multiplies matrices."""
    num_bytes, size = (4 << 30, 8192) if machine.is_gpu else (64 << 20, 512)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copying_s = machine.seconds(lambda: target.copy_(source))
    matrix = torch.randn(size, size, device=machine.device).to(machine.dtype)
    multiplying_s = machine.seconds(lambda: matrix @ matrix)
    yield asdict(Limits(2 * num_bytes / copying_s, 2 * size**3 / multiplying_s))


def check_attention(machine: Machine) -> Rows:
    """Compares the backends with PyTorch's in float32: the largest errors, of values about 1."""
    spans = [(0, 1), (255, 1), (256, 1), (1900, 1), (700, 5), (100, 300)]
    for dtype in (torch.float16, torch.bfloat16):
        cache, attend_of, (query, key, value) = _attention(machine, spans, dtype, dtype)
        for name, backend in machine.backends(machine.config):
            context = attend_of(backend)(0, query, key, value)
            exact = KVCache(machine.one_layer, cache.num_blocks, BLOCK_SIZE, torch.float32, machine.device)
            exact.keys.copy_(cache.keys)
            exact.values.copy_(cache.values)
            reference = _bind(TorchAttention(machine.config, machine.device), exact, spans, machine.device)
            expected = reference(0, query.float(), key.float(), value.float())
            yield {"backend": name, "dtype": str(dtype), "error": (context - expected).abs().max().item()}


def check_products(machine: Machine) -> Rows:
    """Compares products with those of float32, and the bits of a row alone with those among others."""
    d_in, d_out = machine.config.d_model, 3 * machine.config.d_model
    x = torch.randn(300, d_in, device=machine.device).to(machine.dtype)
    weight = (torch.randn(d_out, d_in, device=machine.device) * d_in**-0.5).to(machine.dtype)
    expected = x.float() @ weight.float().T
    for name, weight_format in machine.weight_formats():
        linear = _linear(weight, weight_format)
        rows = linear(x)
        alone = [torch.equal(linear(x[first:end]), rows[first:end]) for first, end in ((0, 1), (5, 22), (100, 230))]
        error = ((rows - expected).abs().max() / expected.abs().max()).item()
        yield {"product": name, "error": error, "equal bits in other batches": all(alone)}


def measure_products(machine: Machine) -> Rows:
    """Measures products with the largest matrix of a layer."""
    d_in, d_out = machine.config.d_model, 4 * machine.config.d_model
    weight = torch.randn(d_out, d_in, device=machine.device).to(machine.dtype)
    for name, weight_format in machine.weight_formats():
        # Several copies, so that none is in the card's cache when its turn comes.
        layers = [_linear(weight, weight_format) for _ in range(8)]
        for num_rows in (1, 16, 64, 512):
            x = torch.randn(num_rows, d_in, device=machine.device).to(machine.dtype)
            seconds = machine.seconds(partial(_call_all, layers, x)) / len(layers)
            num_bytes = weight.numel() * weight_format.stored_dtype.itemsize
            speed = {"bytes_per_s": num_bytes / seconds, "operations_per_s": 2 * num_rows * weight.numel() / seconds}
            yield {"product": name, "rows": num_rows, "ms": 1000 * seconds, **speed}


def measure_attention(machine: Machine) -> Rows:
    """Measures one layer's attention: many sequences that decode, one that does, and a chunk."""
    lengths = (512, 2048, 8192) if machine.is_gpu else (64,)
    cases = [*(([(n, 1)] * count) for count in (1, 16, 64) for n in lengths), [(0, 512)], [(1536, 512)]]
    for spans in cases:
        cache, attend_of, inputs = _attention(machine, spans, machine.dtype, machine.dtype)
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
    cases: list[tuple[int, int, int]] = [*((n, 512, 1) for n in (1, 16, 64)), (1, 0, 512)]
    for num_sequences, context, tokens in cases:
        spans = [(context, tokens)] * num_sequences
        decodes = tokens == 1
        cost = step_cost(config, num_sequences if decodes else 0, context, chunk=0 if decodes else tokens)
        if weight_format.quantize:
            cost = replace(cost, weight_bytes=cost.weight_bytes // 2)
        for name, runner in _runners(machine, model, spans):
            plan, sampler = _plan(spans), Sampler(config.vocab_size)

            def step(runner: Runner = runner, plan: StepPlan = plan, sampler: Sampler = sampler) -> None:
                output = runner.run(plan)
                sampler.sample(output.logits, plan.sequences, are_finite=output.are_finite)

            seconds = machine.seconds(step)
            row = {"attention": name, "sequences": num_sequences, "context": context, "tokens": tokens}
            limit_ms = 1000 * cost.seconds(limits)
            yield {**row, "ms": 1000 * seconds, "limit_ms": limit_ms, "share": limit_ms / (1000 * seconds)}


def _linear(weight: Tensor, weight_format: WeightFormat) -> Linear:
    linear = Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.prepack(weight_format)
    return linear


def _call_all(layers: Sequence[Linear], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def _runners(machine: Machine, model: MPT, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Runner]]:
    cache = KVCache(machine.config, _num_blocks(spans), BLOCK_SIZE, machine.dtype, machine.device)
    for name, backend in machine.backends(machine.config):
        parts = (model, cache, backend, machine.device, machine.config.vocab_size)
        if ("invariant" in name) != model.weight_format.batch_invariant:
            continue
        yield name, Runner(*parts)
        if name.startswith("triton"):
            recorded = Runner(*parts, CudaRecorder())
            recorded.warm_up(len(spans), max(map(sum, spans)))
            yield f"{name}, recorded", recorded


def _attention(
    machine: Machine, spans: Sequence[tuple[int, int]], dtype: torch.dtype, cache_dtype: torch.dtype
) -> tuple[KVCache, Callable[[AttentionBackend], Any], tuple[Tensor, ...]]:
    """Returns a cache of one step with random contents, what binds a backend to it, and queries, keys and values."""
    config, device = machine.one_layer, machine.device
    cache = KVCache(config, _num_blocks(spans), BLOCK_SIZE, cache_dtype, device)
    for layer in (cache.keys[0], cache.values[0]):
        layer.normal_()
    heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
    num_tokens = sum(count for _, count in spans)
    inputs = tuple(torch.randn(num_tokens, n, config.head_dim, device=device).to(dtype) for n in heads)
    return cache, lambda backend: _bind(backend, cache, spans, device), inputs


def _bind(backend: AttentionBackend, cache: KVCache, spans: Sequence[tuple[int, int]], device: torch.device) -> Any:
    return backend.bind(cache, MetadataBuilder(BLOCK_SIZE, device).build(_plan(spans)))


def _num_blocks(spans: Sequence[tuple[int, int]]) -> int:
    return sum(-(-sum(span) // BLOCK_SIZE) for span in spans)


def _plan(spans: Sequence[tuple[int, int]]) -> StepPlan:
    """Returns a step of sequences with a context and a number of new tokens each, sampled greedily."""
    steps, first = [], 0
    inputs = (SamplingInputs(SamplingParameters(temperature=0, seed=0)),)
    for number, (start, count) in enumerate(spans):
        num_blocks = -(-(start + count) // BLOCK_SIZE)
        table = tuple(range(first, first + num_blocks))
        first += num_blocks
        steps.append(SequenceStep(number, str(number), (number % 90,) * count, start, table, inputs))
    return StepPlan(tuple(steps))


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
        ("checks", lambda: chain(check_attention(machine), check_products(machine))),
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
        except RuntimeError as error:  # such as a card with too little memory: the other parts are still worth running
            rows.append({"failed": str(error)})
        parsed.output.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
