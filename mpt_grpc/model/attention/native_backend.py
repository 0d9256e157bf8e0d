"""Attention by the compiled kernels, in place over the paged cache on the CPU."""

from __future__ import annotations

import torch

from mpt_grpc.model.attention import AttentionMetadata
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.mpt import alibi_slopes
from mpt_grpc.model.native import AttentionStep, Kernels, NativeAttend

_NO_WINDOW = 2**63 - 1


class NativeAttention:
    """An `AttentionBackend` for float32 queries, keys and values, and a cache of float32, bfloat16 or int8.

    The cache's blocks have a multiple of 16 tokens.
    """

    def __init__(self, config: MPTConfig, kernels: Kernels) -> None:
        self._config, self._kernels = config, kernels
        self._slopes = (
            alibi_slopes(config.n_heads, config.alibi_bias_max) if config.alibi else torch.zeros(config.n_heads)
        )

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> NativeAttend:
        config, tables = self._config, metadata.block_tables
        query_starts, starts = metadata.query_starts_tensor, metadata.starts_tensor
        step = AttentionStep(
            num_tokens=len(metadata.token_ids),
            num_sequences=len(starts),
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            block_size=cache.block_size,
            query_starts=query_starts.data_ptr(),
            starts=starts.data_ptr(),
            block_tables=tables.data_ptr(),
            table_stride=tables.stride(0),
            slopes=self._slopes.data_ptr(),
            scale=config.softmax_scale,
            window=_NO_WINDOW if config.sliding_window is None else config.sliding_window,
        )
        return NativeAttend(self._kernels, step, cache.keys, cache.values, query_starts, starts, tables, self._slopes)
