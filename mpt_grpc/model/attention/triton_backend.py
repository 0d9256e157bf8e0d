"""Attention by Triton kernels, in place over the paged cache on an NVIDIA GPU."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mpt_grpc.model.attention import AttentionMetadata
from mpt_grpc.model.attention.tiling import SPLIT_KEYS, decode_tiling, prefill_tiling
from mpt_grpc.model.attention.triton_operator import paged_attention
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.mpt import Attend, alibi_slopes
from mpt_grpc.model.transfer import send_all

_LOG2_E = math.log2(math.e)


class TritonAttention:
    """An `AttentionBackend` for a cache of the queries' type or of int8, and heads of at most 128 dimensions."""

    def __init__(self, config: MPTConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        group = config.n_heads // config.n_kv_heads
        self._decode_tokens = decode_tiling(group).tokens
        self._prefill_tokens = prefill_tiling(group).tokens
        slopes = alibi_slopes(config.n_heads, config.alibi_bias_max) if config.alibi else torch.zeros(config.n_heads)
        self._slopes = (slopes * _LOG2_E).to(device)
        self._no_tiles = torch.empty((0, 2), dtype=torch.int64, device=device)

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> Attend:
        config, device = self._config, self._device
        counts = [end - first for first, end in pairwise(metadata.query_starts)]
        # The lengths of the sequences whose queries fit into one tile each; of the others, the tiles.
        short = [
            (count, start + count)
            for start, count in zip(metadata.starts, counts, strict=True)
            if count <= self._decode_tokens
        ]
        tiles = [
            (sequence, first)
            for sequence, count in enumerate(counts)
            if count > self._decode_tokens
            for first in range(0, count, self._prefill_tokens)
        ]
        max_count = max((count for count, _ in short), default=0)
        splits = max((-(-length // SPLIT_KEYS) for _, length in short), default=0)
        parts = (len(counts), max_count, config.n_heads, splits)
        workspace = [
            torch.empty(shape, device=device)
            for shape in ((len(metadata.token_ids), config.n_kv_heads), (*parts, config.head_dim), parts, parts)
        ]
        tile_array = self._no_tiles
        if tiles:
            (tile_array,) = send_all([np.array(tiles, dtype=np.int64)], device)
        step = (
            metadata.blocks,
            metadata.offsets,
            metadata.query_starts_tensor,
            metadata.starts_tensor,
            metadata.block_tables,
            tile_array,
            self._slopes,
            config.softmax_scale * _LOG2_E,
            -1 if config.sliding_window is None else config.sliding_window,
            *workspace,
        )

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return paged_attention(query, key, value, cache.keys, cache.values, layer, *step)

        return attend
