"""Attention by Triton kernels, in place over the paged cache on an NVIDIA GPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
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
_WORKSPACE_BYTES = 64 << 20
"""The most memory that the parts of split contexts take at once; there may be more tiles than fit into it."""


class TritonAttention:
    """An `AttentionBackend` for a cache of the queries' type or of int8, and heads of at most 128 dimensions.

    A few tokens of a sequence attend in splits of its context, so that there is work for all processors; longer chunks
    do not. If the attention is batch-invariant, they do as well, and a token's context has the same bits in either.
    """

    def __init__(self, config: MPTConfig, device: torch.device, *, batch_invariant: bool = False) -> None:
        self._config, self._device = config, device
        group = config.n_heads // config.n_kv_heads
        self._split_tokens = decode_tiling(group).tokens
        self._whole_tokens = prefill_tiling(group).tokens
        self._longest_split = sys.maxsize if batch_invariant else self._split_tokens
        """How many new tokens of a sequence attend in splits."""
        slopes = alibi_slopes(config.n_heads, config.alibi_bias_max) if config.alibi else torch.zeros(config.n_heads)
        self._slopes = (slopes * _LOG2_E).to(device)

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> Attend:
        config, device = self._config, self._device
        counts = [end - first for first, end in pairwise(metadata.query_starts)]
        split_tiles, whole_tiles = self._tiles(counts)
        in_splits = [
            (count, start + count)
            for start, count in zip(metadata.starts, counts, strict=True)
            if count <= self._longest_split
        ]
        max_count = min(max((count for count, _ in in_splits), default=0), self._split_tokens)
        splits = max((-(-length // SPLIT_KEYS) for _, length in in_splits), default=0)
        tile_shape = (max_count, config.n_heads, splits)
        tile_bytes = 4 * math.prod(tile_shape) * (config.head_dim + 2)
        num_at_once = min(len(split_tiles), max(1, _WORKSPACE_BYTES // max(1, tile_bytes)))
        parts = (num_at_once, *tile_shape)
        workspace = [
            torch.empty(shape, device=device)
            for shape in ((len(metadata.token_ids), config.n_kv_heads), (*parts, config.head_dim), parts, parts)
        ]
        step = (
            metadata.blocks,
            metadata.offsets,
            metadata.query_starts_tensor,
            metadata.starts_tensor,
            metadata.block_tables,
            split_tiles,
            whole_tiles,
            self._slopes,
            config.softmax_scale * _LOG2_E,
            -1 if config.sliding_window is None else config.sliding_window,
            *workspace,
        )

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return paged_attention(query, key, value, cache.keys, cache.values, layer, *step)

        return attend

    def _tiles(self, counts: Sequence[int]) -> list[Tensor]:
        """Returns the tiles that attend in splits and the others, [n, 2], of sequences with `counts` new tokens."""
        if max(counts) == 1:  # a step that may be recorded, for which nothing is sent
            sequences = torch.arange(len(counts), device=self._device)
            return [torch.stack((sequences, torch.zeros_like(sequences)), dim=1), sequences.new_empty(0, 2)]
        split: list[tuple[int, int]] = []
        whole: list[tuple[int, int]] = []
        for sequence, count in enumerate(counts):
            tiles, size = (whole, self._whole_tokens) if count > self._longest_split else (split, self._split_tokens)
            tiles += [(sequence, first) for first in range(0, count, size)]
        return send_all([np.array(tiles, dtype=np.int64).reshape(-1, 2) for tiles in (split, whole)], self._device)
