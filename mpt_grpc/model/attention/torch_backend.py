"""Attention in plain torch, for the CPU and any GPU: the reference that other backends are tested against.

Decoding sequences go through one batched call, each longer chunk through a call of its own, in tiles of queries that
keep the ALiBi bias (a value for each head, query and key) within `_BIAS_BYTES`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mpt_grpc.model.attention import AttentionMetadata
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.mpt import Attend, alibi_slopes

_BIAS_BYTES = 64 << 20


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
        groups = self._groups(metadata, cache.block_size)
        # A bias that fits is made once a step instead of once a layer.
        biases = [self._bias(group, cache.block_size) if len(groups) == 1 else None for group in groups]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.write(layer, metadata.blocks, metadata.offsets, key, value)
            context = torch.empty_like(query)
            for group, made in zip(groups, biases, strict=True):
                keys, values = cache.gather(layer, group.tables)
                bias = self._bias(group, cache.block_size) if made is None else made
                context[group.rows] = self._attend(query[group.rows], keys, values, bias)
            return context

        return attend

    def _groups(self, metadata: AttentionMetadata, block_size: int) -> list[_Group]:
        groups, decoding = [], []
        spans = zip(metadata.starts, metadata.first_rows, metadata.first_rows[1:], strict=False)
        for index, (start, first, end) in enumerate(spans):
            if end - first == 1:
                decoding.append(index)
                continue
            tile = max(1, _BIAS_BYTES // (4 * self._config.n_heads * (start + end - first + block_size)))
            for row in range(first, end, tile):
                stop = min(row + tile, end)
                num_blocks = -(-(start + stop - first) // block_size)
                groups.append(
                    _Group(
                        rows=torch.arange(row, stop, device=metadata.positions.device)[None],
                        tables=metadata.block_tables[index : index + 1, :num_blocks],
                        positions=metadata.positions[None, row:stop],
                    )
                )
        if decoding:
            num_blocks = max(metadata.starts[index] for index in decoding) // block_size + 1
            rows = torch.tensor([[metadata.first_rows[index]] for index in decoding], device=metadata.positions.device)
            tables = metadata.block_tables[torch.tensor(decoding, device=rows.device), :num_blocks]
            groups.append(_Group(rows, tables, metadata.positions[rows]))
        return groups

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
        mask = bias if bias.is_cpu else bias.to(query.dtype)
        context = F.scaled_dot_product_attention(folded, keys, values, mask, scale=self._config.softmax_scale)
        return context.unflatten(2, (-1, num_queries)).permute(0, 3, 1, 2, 4).reshape(query.shape)
