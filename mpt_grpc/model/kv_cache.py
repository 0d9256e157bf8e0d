"""The tensors of the KV cache: one pool of blocks a layer. Who owns which block is decided in `schedule/`."""

from __future__ import annotations

import torch
from torch import Tensor

from mpt_grpc.model.config import MPTConfig


class KVCache:
    """Keys and values, each [n_layers, num_blocks, n_kv_heads, block_size, head_dim]."""

    def __init__(
        self, config: MPTConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.n_layers, num_blocks, config.n_kv_heads, block_size, config.head_dim)
        self.num_blocks, self.block_size = num_blocks, block_size
        # Zeros, not garbage: a slot that is masked out still meets the probability 0, and 0 x NaN is NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_block(config: MPTConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * config.n_layers * block_size * config.n_kv_heads * config.head_dim * dtype.itemsize

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores `key` and `value` [num_tokens, n_kv_heads, head_dim] at `offsets` in `blocks`, both [num_tokens].

        What is not finite is stored as 0, so that one request's overflow never reaches a later owner of the block.
        """
        self.keys[layer][blocks, :, offsets] = key.nan_to_num(0.0, 0.0, 0.0)
        self.values[layer][blocks, :, offsets] = value.nan_to_num(0.0, 0.0, 0.0)

    def rows(self, tables: Tensor) -> Tensor:
        """What `gather` needs for `tables` [n, num_blocks], the same in every layer: [n, n_kv_heads, num_blocks]."""
        heads = torch.arange(self.keys.shape[2], device=tables.device)
        return tables[:, None, :] * len(heads) + heads[:, None]

    def gather(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies blocks out, as keys and values [n, n_kv_heads, tokens, head_dim]."""
        shape = (*rows.shape[:2], -1, self.keys.shape[-1])
        # A table of flat rows: over more dimensions index_select copies five times as slowly.
        keys = self.keys[layer].flatten(0, 1).flatten(1).index_select(0, rows.flatten())
        values = self.values[layer].flatten(0, 1).flatten(1).index_select(0, rows.flatten())
        return keys.view(shape), values.view(shape)
