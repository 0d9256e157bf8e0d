"""Attention in plain torch, for the CPU and any GPU: the reference that other backends are tested against.

Decoding sequences of similar length share one batched call. Each longer chunk has calls of its own, in tiles of queries
that keep the ALiBi bias (one value per head, query and key) within `_BIAS_BYTES`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mpt_grpc.model.attention import AttentionMetadata
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.mpt import Attend, alibi_slopes
from mpt_grpc.model.transfer import send

_BIAS_BYTES = 64 << 20
_GATHER_BYTES = 256 << 20
# Contexts of up to this many blocks are padded to the same length: a separate call costs more than the padding.
_SHORT_BLOCKS = 8


@dataclass(frozen=True)
class _Group:
    """Sequences whose attention is computed in one call, all with the same number of queries."""

    token_indices: Tensor
    """[n, queries]: the queries' indices among the step's tokens."""
    tables: Tensor
    """[n, blocks]: the block tables, without the blocks that no sequence of the group needs."""
    positions: Tensor
    """[n, queries]: the queries' positions in their sequences."""


class TorchAttention:
    """An `AttentionBackend` that runs on any device."""

    def __init__(self, config: MPTConfig, device: torch.device) -> None:
        self._config = config
        slopes = alibi_slopes(config.n_heads, config.alibi_bias_max) if config.alibi else torch.zeros(config.n_heads)
        self._slopes = slopes.to(device).view(config.n_kv_heads, -1)

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> Attend:
        groups = [*self._chunks(metadata, cache.block_size), *self._decoders(metadata, cache)]
        block_indices = [cache.flat_indices(group.tables) for group in groups]
        # If they fit, the biases are computed once per step instead of once per layer.
        size = sum(4 * self._slopes.numel() * group.positions.numel() * group.tables.shape[1] for group in groups)
        precompute = size * cache.block_size <= _BIAS_BYTES
        biases = [self._bias(group, cache.block_size) if precompute else None for group in groups]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.write(layer, metadata.blocks, metadata.offsets, key, value)
            context = torch.empty_like(query)
            for group, indices, precomputed in zip(groups, block_indices, biases, strict=True):
                keys, values = cache.gather(layer, indices)
                bias = self._bias(group, cache.block_size) if precomputed is None else precomputed
                context[group.token_indices] = self._attend(query[group.token_indices], keys, values, bias)
            # The cache stores non-finite values as 0; the token's own context must still show that there were any.
            sums = key.sum((1, 2), dtype=torch.float32) + value.sum((1, 2), dtype=torch.float32)
            return context.masked_fill_(~sums.isfinite()[:, None, None], torch.nan)

        return attend

    def _chunks(self, metadata: AttentionMetadata, block_size: int) -> Iterator[_Group]:
        spans = zip(metadata.starts, metadata.query_starts, metadata.query_starts[1:], strict=False)
        for index, (start, first, end) in enumerate(spans):
            if end - first == 1:
                continue
            tile = max(1, _BIAS_BYTES // (4 * self._config.n_heads * (start + end - first + block_size)))
            for tile_start in range(first, end, tile):
                stop = min(tile_start + tile, end)
                yield _Group(
                    token_indices=torch.arange(tile_start, stop, device=metadata.positions.device)[None],
                    tables=metadata.block_tables[index : index + 1, : -(-(start + stop - first) // block_size)],
                    positions=metadata.positions[None, tile_start:stop],
                )

    def _decoders(self, metadata: AttentionMetadata, cache: KVCache) -> Iterator[_Group]:
        """Groups the sequences with one new token by length: beyond `_SHORT_BLOCKS`, padding never doubles a length."""
        spans = zip(metadata.query_starts, metadata.query_starts[1:], strict=False)
        lengths = {
            index: metadata.starts[index] // cache.block_size + 1
            for index, (first, end) in enumerate(spans)
            if end - first == 1
        }
        by_width: defaultdict[int, list[int]] = defaultdict(list)
        for index, num_blocks in lengths.items():
            by_width[max(_SHORT_BLOCKS, 1 << (num_blocks - 1).bit_length())].append(index)
        block_bytes = 2 * cache.keys[0, 0].numel() * cache.keys.itemsize
        for width, similar in by_width.items():
            limit = max(1, _GATHER_BYTES // (width * block_bytes))
            for start in range(0, len(similar), limit):
                members = similar[start : start + limit]
                firsts = [[metadata.query_starts[i]] for i in members]
                rows, token_indices = (
                    send(torch.tensor(part), metadata.positions.device) for part in (members, firsts)
                )
                longest = max(lengths[i] for i in members)
                tables = metadata.block_tables[rows, :longest]
                yield _Group(token_indices, tables, metadata.positions[token_indices])

    def _bias(self, group: _Group, block_size: int) -> Tensor:
        """Returns ALiBi plus the causal mask and the sliding window, float32 [n, n_kv_heads, query heads per key head x
        queries, keys]."""
        keys = torch.arange(group.tables.shape[1] * block_size, device=group.positions.device)
        distance = keys - group.positions[:, None, None, :, None]
        bias = self._slopes[None, :, :, None, None] * distance
        masked = distance > 0
        if self._config.sliding_window is not None:
            masked |= distance < -self._config.sliding_window
        return bias.masked_fill_(masked, -torch.inf).flatten(2, 3)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Returns the context [n, queries, n_heads, head_dim]. Heads sharing a key head are folded into the queries."""
        n, num_queries, _, head_dim = query.shape
        folded = query.view(n, num_queries, *self._slopes.shape, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        scale = self._config.softmax_scale
        if num_queries == 1:
            # Two plain matrix products: for a single query the CPU's fused kernels take three times as long.
            scores = (folded @ keys.transpose(-1, -2)).to(torch.float32) * scale + bias
            context = scores.softmax(dim=-1).to(values.dtype) @ values
        else:
            mask = bias if bias.is_cpu else bias.to(query.dtype)
            context = F.scaled_dot_product_attention(folded, keys, values, mask, scale=scale)
        return context.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4).reshape(query.shape)
