"""What `test_triton.py` checks in a process in which Triton interprets its kernels on the CPU.

The interpreter multiplies float16 and float32 exactly as tensor cores do, up to rounding, but not bfloat16: a cache of
bfloat16 is checked with queries of float16.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model.conftest import CPU, GREEDY, Repeating, Stepper, make_checkpoint, random_tokens, random_weights, tiny_config
from torch import Tensor

from mpt_grpc.model.attention import AttentionBackend, AttentionMetadata, MetadataBuilder
from mpt_grpc.model.attention.torch_backend import TorchAttention
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.gpu_matrix import rounded
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.weights import load_model
from mpt_grpc.step import SamplingInputs, SequenceStep, StepPlan

BLOCK_SIZE = 16
LAYER = 1
"""The layer that is checked; the other must stay as it is."""
FINITE_ERROR = {torch.float32: 2e-6, torch.float16: 2e-3}
"""Of contexts of about 1: a few units of their type's precision."""


def interpret() -> None:
    """Has Triton, which is imported later, interpret its kernels, with products that do not depend on a tile's shape.

    A library's products in float32 differ in bits by the shape and by a row's place, which a card's do not.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    product = np.matmul

    def exact(a: Any, b: Any, dtype: Any = None) -> Any:
        return product(a, b, dtype=np.float64).astype(np.float32 if dtype is None else dtype)

    np.matmul = exact


@dataclass(frozen=True)
class Step:
    """Random queries, keys and values of one step, and a cache with random contents, stale ones included."""

    config: MPTConfig
    metadata: AttentionMetadata
    cache: KVCache
    query: Tensor
    key: Tensor
    value: Tensor

    def run(self, backend: AttentionBackend) -> Tensor:
        return backend.bind(self.cache, self.metadata)(LAYER, self.query, self.key, self.value)


def make_config(attn_config: dict[str, Any], **fields: Any) -> MPTConfig:
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), tiny_config(attn_config, **fields), weights={})
        return MPTConfig.from_file(Path(folder, "config.json"))


def make_plan(spans: Sequence[tuple[int, int]], rng: random.Random) -> tuple[StepPlan, int]:
    """Returns a step of sequences with a context and a number of new tokens each, and how many blocks there are."""
    needed = [-(-sum(span) // BLOCK_SIZE) for span in spans]
    free = list(range(sum(needed) + 5))
    rng.shuffle(free)
    num_blocks = len(free)
    steps = [
        SequenceStep(
            index,
            str(index),
            (1,) * count,
            start,
            tuple(free.pop() for _ in range(num)),
            (SamplingInputs(GREEDY),),
        )
        for index, ((start, count), num) in enumerate(zip(spans, needed, strict=True))
    ]
    return StepPlan(tuple(steps)), num_blocks


def make_step(
    config: MPTConfig, spans: Sequence[tuple[int, int]], dtype: torch.dtype, cache_dtype: torch.dtype, seed: int = 0
) -> Step:
    plan, num_blocks = make_plan(spans, random.Random(seed))
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache(config, num_blocks, BLOCK_SIZE, cache_dtype, CPU)
    for tensor in (cache.keys, cache.values):
        # Sound scales, if there are any, for what was written before.
        items = torch.randn(*tensor.shape[:-1], config.head_dim, generator=generator)
        tensor.copy_(quantized(items) if cache_dtype == torch.int8 else items)
    metadata = MetadataBuilder(BLOCK_SIZE, CPU).build(plan)
    n_heads, n_kv_heads, size = config.n_heads, config.n_kv_heads, config.head_dim
    qkv = torch.randn(len(metadata.token_ids), (n_heads + 2 * n_kv_heads) * size, generator=generator).to(dtype)
    query, key, value = qkv.split([n_heads * size, n_kv_heads * size, n_kv_heads * size], dim=-1)
    return Step(
        config,
        metadata,
        cache,
        query.unflatten(-1, (n_heads, size)),
        key.unflatten(-1, (n_kv_heads, size)),
        value.unflatten(-1, (n_kv_heads, size)),
    )


def quantized(items: Tensor) -> Tensor:
    """Returns blocks [..., BLOCK_SIZE, head_dim] of a cache of int8: for each head the items, then their scales."""
    scales = (items.abs().amax(dim=-1) / 126).to(torch.bfloat16)
    units = (items / scales[..., None]).round().to(torch.int8)
    blocks = torch.cat([units.flatten(-2), scales.view(torch.int8)], dim=-1)
    return blocks.unflatten(-1, (BLOCK_SIZE, -1))


def restored(cache: Tensor, head_dim: int) -> Tensor:
    """Returns what a cache of any type holds, float32 [..., BLOCK_SIZE, head_dim]."""
    if cache.dtype != torch.int8:
        return cache.to(torch.float32)
    units, scales = cache.flatten(-2).split([BLOCK_SIZE * head_dim, 2 * BLOCK_SIZE], dim=-1)
    scale = scales.contiguous().view(torch.bfloat16).to(torch.float32)
    return units.unflatten(-1, (BLOCK_SIZE, head_dim)).to(torch.float32) * scale[..., None]


def triton_attention(config: MPTConfig, *, batch_invariant: bool = False) -> AttentionBackend:
    from mpt_grpc.model.attention.triton_backend import TritonAttention  # only this process interprets Triton

    return TritonAttention(config, CPU, batch_invariant=batch_invariant)


def check_reference(
    attn_config: dict[str, Any],
    fields: dict[str, Any],
    spans: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    seed: int,
) -> None:
    """The context and the cache equal those of the torch backend, which computes in float32 on the same cache."""
    config = make_config(attn_config, **fields)
    step = make_step(config, spans, dtype, cache_dtype, seed)
    before = step.cache.keys.clone(), step.cache.values.clone()
    context = step.run(triton_attention(config))

    reference = KVCache(config, step.cache.num_blocks, BLOCK_SIZE, torch.float32, CPU)
    blocks, offsets = step.metadata.blocks, step.metadata.offsets
    stored = []
    for old, new, to, item in zip(
        before,
        (step.cache.keys, step.cache.values),
        (reference.keys, reference.values),
        (step.key, step.value),
        strict=True,
    ):
        to.copy_(restored(new, config.head_dim))
        stored.append(to[LAYER][blocks, :, offsets])
        error = {torch.int8: 0.008, torch.bfloat16: 0.008}.get(cache_dtype, 0.0)  # a half or, cut off, a whole unit
        largest = item.to(torch.float32).abs().amax(dim=-1, keepdim=True)
        assert ((stored[-1] - item.to(torch.float32)).abs() <= error * largest).all()
        # Nothing else has changed.
        to[LAYER][blocks, :, offsets] = restored(old, config.head_dim)[LAYER][blocks, :, offsets]
        torch.testing.assert_close(to, restored(old, config.head_dim), rtol=0, atol=0)
    attend = TorchAttention(config, CPU).bind(reference, step.metadata)
    expected = attend(LAYER, step.query.to(torch.float32), *stored)
    torch.testing.assert_close(context.to(torch.float32), expected, rtol=0, atol=FINITE_ERROR[dtype])


def check_batch_invariance(spans: Sequence[tuple[int, int]]) -> None:
    """A sequence's context has the same bits alone and beside others, whose contexts are longer."""
    config = make_config({"attn_type": "grouped_query_attention", "kv_n_heads": 2})
    step = make_step(config, spans, torch.float16, torch.float16)
    together = step.run(triton_attention(config))
    plan, _ = make_plan(spans, random.Random(0))
    builder = MetadataBuilder(BLOCK_SIZE, CPU)
    for sequence, first, end in zip(
        plan.sequences, step.metadata.query_starts, step.metadata.query_starts[1:], strict=False
    ):
        part = slice(first, end)
        alone = Step(
            config,
            builder.build(StepPlan((sequence,))),
            step.cache,
            step.query[part],
            step.key[part],
            step.value[part],
        )
        assert torch.equal(alone.run(triton_attention(config)), together[part])


def check_equal_bits_in_chunks(attn_config: dict[str, Any], count: int, ends: Sequence[int]) -> None:
    """A batch-invariant context has the same bits in one chunk as in several, which end at `ends`."""
    config = make_config({**attn_config, "attn_type": "grouped_query_attention", "kv_n_heads": 2})
    backend = triton_attention(config, batch_invariant=True)
    whole = make_step(config, [(250, count)], torch.float16, torch.float16)
    expected = whole.run(backend)
    plan, _ = make_plan([(250, count)], random.Random(0))
    (sequence,) = plan.sequences
    for first, end in pairwise([0, *ends, count]):
        step = sequence._replace(start=250 + first, token_ids=sequence.token_ids[first:end])
        chunk = Step(
            config,
            MetadataBuilder(BLOCK_SIZE, CPU).build(StepPlan((step,))),
            whole.cache,
            *(tensor[first:end] for tensor in (whole.query, whole.key, whole.value)),
        )
        assert torch.equal(chunk.run(backend), expected[first:end])


def check_non_finite_values(cache_dtype: torch.dtype) -> None:
    """A token with a key or value that is not finite gets no finite context, and its block holds 0."""
    config = make_config({"attn_type": "grouped_query_attention", "kv_n_heads": 2})
    spans = [(20, 1), (300, 1), (30, 1), (10, 40)]
    backend = triton_attention(config)
    sound = make_step(config, spans, torch.float16, cache_dtype)
    expected = sound.run(backend)
    step = make_step(config, spans, torch.float16, cache_dtype)
    last = len(step.metadata.token_ids) - 1
    bad = {0: (step.key, torch.inf), 1: (step.value, -torch.inf), last: (step.key, torch.nan)}
    for token, (tensor, value) in bad.items():
        tensor[token, 1, 3] = value
    context = step.run(backend)
    for token, (tensor, _) in bad.items():
        assert not context[token].isfinite().all()
        cache = step.cache.keys if tensor is step.key else step.cache.values
        held = restored(cache, config.head_dim)[LAYER, step.metadata.blocks[token], 1, step.metadata.offsets[token]]
        assert held.isfinite().all()
        assert held[3] == 0
    others = [token for token in range(last) if token not in bad]
    assert torch.equal(context[others], expected[others])


def check_model(attn_config: dict[str, Any], fields: dict[str, Any], *, records: bool) -> None:
    """A whole model has the logits that it has with the torch backend, in chunks and in steps that decode."""
    recorder = Repeating() if records else None
    config = tiny_config(attn_config, **fields)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), config, random_weights(config))
        model = load_model(
            Path(folder), MPTConfig.from_file(Path(folder, "config.json")), WeightFormat(torch.float32, CPU)
        )
    steppers = [
        Stepper(model, block_size=BLOCK_SIZE),
        Stepper(model, block_size=BLOCK_SIZE, attention=triton_attention(model.config), recorder=recorder),
    ]
    if records:
        steppers[1].warm_up(max_sequences=3, max_tokens=100)
    for number, sizes in enumerate([(20, 3, 1), (1, 1, 1), (1, 1, 1), (1, 18, 2)]):
        chunks = {name: random_tokens(size, seed=number) for name, size in zip("abc", sizes, strict=True)}
        expected, logits = (stepper.step(chunks) for stepper in steppers)
        for name, row in expected.items():
            torch.testing.assert_close(logits[name], row, rtol=0, atol=1e-4)
    assert recorder is None or (recorder.num_recordings, recorder.num_replays) == (3, 2)


def check_product(num_rows: int, sizes: tuple[int, int], *, is_int8: bool, batch_invariant: bool) -> None:
    """A product is that of float32, and batch-invariant ones have the same bits alone."""
    from mpt_grpc.model.triton_linear import linear  # only this process interprets Triton

    d_in, d_out = sizes
    generator = torch.Generator().manual_seed(num_rows)
    x, weight, bias, residual = (
        torch.randn(shape, generator=generator).to(torch.float16)
        for shape in ((num_rows, d_in + 8), (d_out, d_in), (d_out,), (num_rows, d_out))
    )
    x = x[:, 8:]  # as a part of a wider matrix
    stored, scales = rounded(weight) if is_int8 else (weight, None)
    restored = stored.to(torch.float32) * (1 if scales is None else scales[:, None])
    for added in ((None, None), (bias, None), (bias, residual)):
        expected = x.to(torch.float32) @ restored.T
        for one in added:
            expected = expected if one is None else expected + one
        actual = linear(x, stored, scales, *added, batch_invariant)
        torch.testing.assert_close(actual.to(torch.float32), expected, rtol=2e-3, atol=0.02)
        if batch_invariant:
            parts = [
                linear(
                    x[row : row + 1],
                    stored,
                    scales,
                    added[0],
                    None if added[1] is None else residual[row : row + 1],
                    True,
                )
                for row in (0, num_rows // 2, num_rows - 1)
            ]
            assert torch.equal(torch.cat(parts), actual[[0, num_rows // 2, num_rows - 1]])
