"""Attention by the compiled kernels, in place over the paged cache on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mpt_grpc.model.attention import AttentionMetadata
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.mpt import Attend, alibi_slopes
from mpt_grpc.model.native import AttentionStep, Kernels


class NativeAttention:
    """An `AttentionBackend` for float32 queries, keys and values, and a cache of float32, bfloat16 or int8.

    The cache's blocks have a multiple of 16 tokens.
    """

    def __init__(self, config: MPTConfig, kernels: Kernels) -> None:
        self._config, self._kernels = config, kernels
        self._slopes = (
            alibi_slopes(config.n_heads, config.alibi_bias_max) if config.alibi else torch.zeros(config.n_heads)
        )

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> Attend:
        config, tables = self._config, metadata.block_tables
        query_starts, starts = np.array(metadata.query_starts), np.array(metadata.starts)
        window = config.sliding_window
        step = AttentionStep(
            num_tokens=len(metadata.token_ids),
            num_sequences=len(starts),
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            block_size=cache.block_size,
            query_starts=query_starts.ctypes.data,
            starts=starts.ctypes.data,
            block_tables=tables.data_ptr(),
            table_stride=tables.stride(0),
            slopes=self._slopes.data_ptr(),
            scale=config.softmax_scale,
            window=np.iinfo(np.int64).max if window is None else window,
        )
        keys, values = cache.keys.data_ptr(), cache.values.data_ptr()
        layer_bytes = cache.keys[0].nbytes

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            context = torch.empty(query.shape)
            step.query, step.query_stride = query.data_ptr(), query.stride(0)
            step.key, step.key_stride = key.data_ptr(), key.stride(0)
            step.value, step.value_stride = value.data_ptr(), value.stride(0)
            step.context = context.data_ptr()
            step.keys, step.values = keys + layer * layer_bytes, values + layer * layer_bytes
            self._kernels.attend(step, cache.keys.dtype)
            return context

        # The arrays live as long as the step that points to them.
        attend.__dict__["arrays"] = (query_starts, starts, tables)
        return attend
