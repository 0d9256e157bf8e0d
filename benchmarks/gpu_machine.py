"""What the checks and the measurements of the kernels for GPUs have in common: where they run, and steps to run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpt_grpc.model.attention import AttentionBackend, MetadataBuilder
from mpt_grpc.model.attention.torch_backend import TorchAttention
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.graphs import CudaRecorder
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.linear import Linear, WeightFormat
from mpt_grpc.model.mpt import MPT
from mpt_grpc.model.runner import Runner
from mpt_grpc.request import SamplingParameters
from mpt_grpc.step import SamplingInputs, SequenceStep, StepPlan

BLOCK_SIZE = 16
Rows = Iterator[dict[str, Any]]
Spans = Sequence[tuple[int, int]]
"""The context and the number of new tokens of each sequence of a step."""


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
        if self.is_gpu:
            from mpt_grpc.model.attention.triton_backend import TritonAttention

            yield "triton", TritonAttention(config, self.device)
            yield "triton, batch-invariant", TritonAttention(config, self.device, batch_invariant=True)
        yield "torch", TorchAttention(config, self.device)

    def weight_formats(self) -> Iterator[tuple[str, WeightFormat]]:
        """Yields what multiplies, and the form of the weights."""
        common = partial(WeightFormat, self.dtype, self.device, by_triton=self.is_gpu)
        yield "16 bits", common()
        yield "8 bits", common(quantize=True)
        yield "16 bits, batch-invariant", common(batch_invariant=True)

    def runners(self, model: MPT, spans: Spans) -> Iterator[tuple[str, Runner]]:
        """Yields runners of a model on caches for the spans, the fastest first: with and without CUDA graphs."""
        cache = KVCache(model.config, num_blocks(spans), BLOCK_SIZE, self.dtype, self.device)
        for name, backend in self.backends(model.config):
            parts = (model, cache, backend, self.device, model.config.vocab_size)
            if ("invariant" in name) != model.weight_format.batch_invariant:
                continue
            if name.startswith("triton"):
                recorded = Runner(*parts, CudaRecorder())
                recorded.warm_up(len(spans), max(map(sum, spans)))
                yield f"{name}, recorded", recorded
            yield name, Runner(*parts)

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


def linear_of(weight: Tensor, weight_format: WeightFormat) -> Linear:
    """Returns a layer with a weight."""
    linear = Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.prepack(weight_format)
    return linear


def attention_of(
    machine: Machine, spans: Spans, dtype: torch.dtype
) -> tuple[KVCache, Callable[[AttentionBackend], Any], tuple[Tensor, ...]]:
    """Returns a cache of one step with random contents, what binds a backend to it, and queries, keys and values."""
    config, device = machine.one_layer, machine.device
    cache = KVCache(config, num_blocks(spans), BLOCK_SIZE, dtype, device)
    for layer in (cache.keys[0], cache.values[0]):
        layer.normal_()
    heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
    num_tokens = sum(count for _, count in spans)
    inputs = tuple(torch.randn(num_tokens, n, config.head_dim, device=device).to(dtype) for n in heads)
    return cache, lambda backend: bound(backend, cache, spans, device), inputs


def bound(backend: AttentionBackend, cache: KVCache, spans: Spans, device: torch.device) -> Any:
    """Returns the attention of one step."""
    return backend.bind(cache, MetadataBuilder(BLOCK_SIZE, device).build(plan_of(spans)))


def num_blocks(spans: Spans) -> int:
    """Returns how many blocks the sequences of a step take."""
    return sum(-(-sum(span) // BLOCK_SIZE) for span in spans)


def plan_of(spans: Spans, token_ids: Sequence[Sequence[int]] | None = None, *, blocks_each: int = 0) -> StepPlan:
    """Returns a step, sampled greedily. Sequences have `blocks_each` blocks, or as many as they need."""
    steps, first = [], 0
    inputs = (SamplingInputs(SamplingParameters(temperature=0, seed=0)),)
    for number, (start, count) in enumerate(spans):
        needed = -(-(start + count) // BLOCK_SIZE)
        table = tuple(range(first, first + needed))
        first += max(blocks_each, needed)
        tokens = (number % 90,) * count if token_ids is None else tuple(token_ids[number])
        steps.append(SequenceStep(number, str(number), tokens, start, table, inputs))
    return StepPlan(tuple(steps))
