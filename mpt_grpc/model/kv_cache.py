"""The tensors of the KV cache: one pool of blocks per layer. Ownership of the blocks is decided in `schedule/`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpt_grpc.model import pages
from mpt_grpc.model.config import MPTConfig

_SCALE_BYTES = 2


class KVCache:
    """Keys and values, each [n_layers, num_blocks, n_kv_heads, block_size, head_dim].

    The compiled kernels arrange a block's keys and values of one head in their own way. In a cache of int8 they store a
    scale with each, for which the last dimension has two more bytes.
    """

    def __init__(
        self, config: MPTConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.n_layers, num_blocks, config.n_kv_heads, block_size, self._row_items(config, dtype))
        self.num_blocks, self.block_size = num_blocks, block_size
        # Zeros, not uninitialized memory: masked positions are still multiplied by probability 0, and 0 x NaN is NaN.
        self.keys, self.values = (_zeros(shape, dtype, device) for _ in range(2))

    @staticmethod
    def bytes_per_block(config: MPTConfig, block_size: int, dtype: torch.dtype) -> int:
        """Returns the size of one block: keys and values of all layers."""
        row_bytes = KVCache._row_items(config, dtype) * dtype.itemsize
        return 2 * config.n_layers * block_size * config.n_kv_heads * row_bytes

    @staticmethod
    def _row_items(config: MPTConfig, dtype: torch.dtype) -> int:
        return config.head_dim + (_SCALE_BYTES if dtype is torch.int8 else 0)

    def write(self, layer: int, blocks: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        """Stores `key` and `value` [num_tokens, n_kv_heads, head_dim] at `offsets` in `blocks`, both [num_tokens].

        Non-finite values are stored as 0, so that one request's overflow never affects a later owner of the block.
        """
        self.keys[layer][blocks, :, offsets] = key.nan_to_num(0.0, 0.0, 0.0)
        self.values[layer][blocks, :, offsets] = value.nan_to_num(0.0, 0.0, 0.0)

    def flat_indices(self, tables: Tensor) -> Tensor:
        """Returns the indices [n, n_kv_heads, num_blocks] with which `gather` reads the block `tables` [n, num_blocks].

        They are the same for every layer.
        """
        heads = torch.arange(self.keys.shape[2], device=tables.device)
        return tables[:, None, :] * len(heads) + heads[:, None]

    def gather(self, layer: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a copy of the blocks at `flat_indices`: keys and values [n, n_kv_heads, tokens, head_dim]."""
        shape = (*indices.shape[:2], -1, self.keys.shape[-1])
        # Flattened to two dimensions: index_select over four is five times as slow.
        keys = self.keys[layer].flatten(0, 1).flatten(1).index_select(0, indices.flatten())
        values = self.values[layer].flatten(0, 1).flatten(1).index_select(0, indices.flatten())
        return keys.view(shape), values.view(shape)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return pages.zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
