"""Attention in plain torch, for the CPU and any GPU: the reference that other backends are tested against.

Decoding sequences of similar length go through one batched call, each longer chunk through a call of its own, in tiles
of queries that keep the ALiBi bias (a value for each head, query and key) within `_BIAS_BYTES`.
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

_BIAS_BYTES = 64 << 20
_GATHER_BYTES = 256 << 20
# Contexts up to so many blocks are padded to one another: a call costs more than what that wastes.
_SHORT_BLOCKS = 8


@dataclass(frozen=True)
class _Group:
    """Sequences that are attended in one call, each with as many queries."""

    rows: Tensor
    """[n, queries]: rows of the step's tokens."""
    tables: Tensor
    """[n, blocks]: the blocks in use, and no more."""
    positions: Tensor
    """[n, queries]: the queries' places in their sequences."""


class TorchAttention:
    """The `AttentionBackend` of any device."""

    def __init__(self, config: MPTConfig, device: torch.device) -> None:
        self._config = config
        slopes = alibi_slopes(config.n_heads, config.alibi_bias_max) if config.alibi else torch.zeros(config.n_heads)
        self._slopes = slopes.to(device).view(config.n_kv_heads, -1)

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> Attend:
        groups = [*self._chunks(metadata, cache.block_size), *self._decoders(metadata, cache)]
        rows = [cache.rows(group.tables) for group in groups]
        # Biases that fit are made once a step instead of once a layer.
        size = sum(4 * self._slopes.numel() * group.positions.numel() * group.tables.shape[1] for group in groups)
        keep = size * cache.block_size <= _BIAS_BYTES
        biases = [self._bias(group, cache.block_size) if keep else None for group in groups]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.write(layer, metadata.blocks, metadata.offsets, key, value)
            context = torch.empty_like(query)
            for group, group_rows, made in zip(groups, rows, biases, strict=True):
                keys, values = cache.gather(layer, group_rows)
                bias = self._bias(group, cache.block_size) if made is None else made
                context[group.rows] = self._attend(query[group.rows], keys, values, bias)
            # The cache holds 0 for what is not finite; the token's own state must not look as if nothing had happened.
            sums = key.sum((1, 2), dtype=torch.float32) + value.sum((1, 2), dtype=torch.float32)
            return context + (sums * 0)[:, None, None].to(context.dtype)

        return attend

    def _chunks(self, metadata: AttentionMetadata, block_size: int) -> Iterator[_Group]:
        spans = zip(metadata.starts, metadata.first_rows, metadata.first_rows[1:], strict=False)
        for index, (start, first, end) in enumerate(spans):
            if end - first == 1:
                continue
            tile = max(1, _BIAS_BYTES // (4 * self._config.n_heads * (start + end - first + block_size)))
            for row in range(first, end, tile):
                stop = min(row + tile, end)
                yield _Group(
                    rows=torch.arange(row, stop, device=metadata.positions.device)[None],
                    tables=metadata.block_tables[index : index + 1, : -(-(start + stop - first) // block_size)],
                    positions=metadata.positions[None, row:stop],
                )

    def _decoders(self, metadata: AttentionMetadata, cache: KVCache) -> Iterator[_Group]:
        """Sequences with one new token, by length: none is padded to more than twice its blocks, beyond a few."""
        spans = zip(metadata.first_rows, metadata.first_rows[1:], strict=False)
        lengths = {
            index: metadata.starts[index] // cache.block_size + 1
            for index, (first, end) in enumerate(spans)
            if end - first == 1
        }
        by_width: defaultdict[int, list[int]] = defaultdict(list)
        for index, num_blocks in lengths.items():
            by_width[max(_SHORT_BLOCKS, 1 << (num_blocks - 1).bit_length())].append(index)
        block_bytes = 2 * cache.keys[0, 0].numel() * cache.keys.itemsize
        for width, alike in by_width.items():
            limit = max(1, _GATHER_BYTES // (width * block_bytes))
            for at in range(0, len(alike), limit):
                some = alike[at : at + limit]
                rows = torch.tensor([[metadata.first_rows[i]] for i in some], device=metadata.positions.device)
                tables = metadata.block_tables[torch.tensor(some, device=rows.device), : max(lengths[i] for i in some)]
                yield _Group(rows, tables, metadata.positions[rows])

    def _bias(self, group: _Group, block_size: int) -> Tensor:
        """ALiBi and the causal mask, [n, n_kv_heads, heads of a group x queries, keys] of float32."""
        keys = torch.arange(group.tables.shape[1] * block_size, device=group.positions.device)
        distance = keys - group.positions[:, None, None, :, None]
        bias = self._slopes[None, :, :, None, None] * distance
        return bias.masked_fill_(distance > 0, -torch.inf).flatten(2, 3)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Context [n, queries, n_heads, head_dim]. The heads that share a key head are folded into the queries."""
        n, num_queries, _, head_dim = query.shape
        folded = query.view(n, num_queries, *self._slopes.shape, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        scale = self._config.softmax_scale
        if num_queries == 1:
            # Two plain products: the fused kernels of the CPU take three times as long over a single query.
            scores = (folded @ keys.transpose(-1, -2)).to(torch.float32) * scale + bias
            context = scores.softmax(dim=-1).to(values.dtype) @ values
        else:
            mask = bias if bias.is_cpu else bias.to(query.dtype)
            context = F.scaled_dot_product_attention(folded, keys, values, mask, scale=scale)
        return context.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4).reshape(query.shape)
