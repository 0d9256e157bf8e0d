"""Checks of the kernels for GPUs on a real card: attention, products and whole models against PyTorch in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.gpu_machine import BLOCK_SIZE, Machine, Rows, attention_of, bound, linear_of, num_blocks, plan_of
from mpt_grpc.model.attention.torch_backend import TorchAttention
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.mpt import MPT
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.weights import load_model, parameter_shapes

_BASE = {"model_type": "mpt", "d_model": 512, "n_heads": 4, "n_layers": 2, "vocab_size": 4096, "max_seq_len": 2048}
_MODELS: Mapping[str, dict[str, Any]] = {
    "like MPT-7B": {},
    "like StoryWriter": {"attn_config": {"clip_qkv": 6, "alibi_bias_max": 16}},
    "like MPT-30B": {"d_model": 448},
    "grouped queries, sliding window": {
        "n_heads": 8,
        "attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "sliding_window_size": 100},
    },
    "one key head": {"n_heads": 8, "attn_config": {"attn_type": "multiquery_attention", "qk_ln": True}},
}
_PROMPTS, _NUM_DECODED = (5, 70, 235, 300), 32
"""The lengths of the prompts, of which some cross a split of the context while their outputs grow."""


def check_attention(machine: Machine) -> Rows:
    """Compares the backends with PyTorch's in float32: the largest errors, of values about 1."""
    spans = [(0, 1), (255, 1), (256, 1), (1900, 1), (700, 5), (100, 300)]
    for dtype in (torch.float16, torch.bfloat16):
        cache, attend_of, (query, key, value) = attention_of(machine, spans, dtype)
        for name, backend in machine.backends(machine.config):
            context = attend_of(backend)(0, query, key, value)
            exact = KVCache(machine.one_layer, cache.num_blocks, BLOCK_SIZE, torch.float32, machine.device)
            exact.keys.copy_(cache.keys)
            exact.values.copy_(cache.values)
            reference = bound(TorchAttention(machine.config, machine.device), exact, spans, machine.device)
            expected = reference(0, query.float(), key.float(), value.float())
            yield {"backend": name, "dtype": str(dtype), "error": (context - expected).abs().max().item()}


def check_products(machine: Machine) -> Rows:
    """Compares products with those of float32, and the bits of a row alone with those among others."""
    d_in, d_out = machine.config.d_model, 3 * machine.config.d_model
    x = torch.randn(300, d_in, device=machine.device).to(machine.dtype)
    weight = (torch.randn(d_out, d_in, device=machine.device) * d_in**-0.5).to(machine.dtype)
    expected = x.float() @ weight.float().T
    for name, weight_format in machine.weight_formats():
        linear = linear_of(weight, weight_format)
        rows = linear(x)
        alone = [torch.equal(linear(x[first:end]), rows[first:end]) for first, end in ((0, 1), (5, 22), (100, 230))]
        error = ((rows - expected).abs().max() / expected.abs().max()).item()
        yield {"product": name, "error": error, "equal bits in other batches": all(alone)}


def check_models(machine: Machine) -> Rows:
    """Compares small models with float32, in chunks and in decoding steps: logits, and the most probable tokens.

    Errors are those of logits, in units of the largest one. All models get the tokens that float32 finds most probable.
    """
    for name, fields in _MODELS.items():
        config = MPTConfig.from_dict({**_BASE, **fields})
        with tempfile.TemporaryDirectory() as folder:
            generator = torch.Generator().manual_seed(0)
            tensors = {
                tensor: torch.randn(shape, generator=generator).mul_(0.05).add_(len(shape) == 1).to(machine.dtype)
                for tensor, shape in parameter_shapes(config).items()
            }
            save_file(tensors, Path(folder, "model.safetensors"))
            exact, model = (
                load_model(Path(folder), config, WeightFormat(dtype, machine.device))
                for dtype in (torch.float32, machine.dtype)
            )
        for backend, runner in replace(machine, config=config).runners(model, _largest(config)):
            errors, num_equal, num = [], 0, 0
            for expected, logits in _steps(machine, exact, runner):
                errors.append(((logits - expected).abs().max() / expected.abs().max()).item())
                num_equal += int((logits.argmax(dim=-1) == expected.argmax(dim=-1)).sum())
                num += len(logits)
            yield {"model": name, "attention": backend, "error": max(errors), "equal tokens": num_equal / num}


def _largest(config: MPTConfig) -> list[tuple[int, int]]:
    """Returns spans whose blocks suffice for all sequences."""
    return [(min(512, config.max_seq_len) - 1, 1)] * len(_PROMPTS)


def _steps(machine: Machine, exact: MPT, runner: Runner) -> Any:
    """Yields the logits of a model in float32 and those of a runner, step by step."""
    config, device, spans = exact.config, machine.device, _largest(exact.config)
    cache = KVCache(config, num_blocks(spans), BLOCK_SIZE, torch.float32, device)
    reference = Runner(exact, cache, TorchAttention(config, device), device, config.vocab_size)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in _PROMPTS]
    starts = [0] * len(tokens)
    for _ in range(1 + _NUM_DECODED):
        step = [(start, len(part)) for start, part in zip(starts, tokens, strict=True)]
        plan = plan_of(step, tokens, blocks_each=512 // BLOCK_SIZE)
        expected, logits = (one.run(plan).logits for one in (reference, runner))
        yield expected, logits
        starts = [start + count for start, count in step]
        tokens = [[token_id] for token_id in expected.argmax(dim=-1).tolist()]
