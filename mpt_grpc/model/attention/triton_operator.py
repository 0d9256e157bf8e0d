"""Launches the Triton kernels, as one operator of PyTorch: it is traced without a GPU, and counts as one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mpt_grpc.model.attention import triton_kernels as kernels
from mpt_grpc.model.attention.tiling import SPLIT_KEYS, decode_tiling, power_of_two, prefill_tiling
from mpt_grpc.model.triton_launch import Launch

_LIBRARY = torch.library.Library("mpt_grpc", "FRAGMENT")
_LIBRARY.define(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, int layer,"
    " Tensor blocks, Tensor offsets, Tensor query_starts, Tensor starts, Tensor tables, Tensor split_tiles,"
    " Tensor whole_tiles, Tensor slopes, float scale, int window, Tensor(c!) faults, Tensor(d!) sums,"
    " Tensor(e!) maxima, Tensor(f!) totals) -> Tensor"
)


def launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: int,
    blocks: Tensor,
    offsets: Tensor,
    query_starts: Tensor,
    starts: Tensor,
    tables: Tensor,
    split_tiles: Tensor,
    whole_tiles: Tensor,
    slopes: Tensor,
    scale: float,
    window: int,
    faults: Tensor,
    sums: Tensor,
    maxima: Tensor,
    totals: Tensor,
    *,
    context: Tensor,
) -> Iterator[Launch]:
    """Yields the launches that write `key` and `value` to the cache and compute the context, as `query` is shaped.

    `scale` and `slopes` [n_heads] are for scores in base 2; a `window` below 0 is no window. The tensors between
    `values` and `slopes` say where the step's tokens are, those from `faults` to `totals` are overwritten; the kernels
    describe them. `split_tiles` are those that attend in splits, as many at once as `maxima` has room for, and
    `whole_tiles` the others.
    """
    _, n_heads, head_dim = query.shape
    num_tokens, n_kv_heads, _ = key.shape
    block_size, group = keys.shape[3], n_heads // n_kv_heads
    num_at_once, max_count, _, splits = maxima.shape
    is_int8 = keys.dtype == torch.int8
    heads = {"N_KV_HEADS": n_kv_heads, "HEAD_DIM": head_dim, "PADDED_DIM": max(16, power_of_two(head_dim))}
    cache = {
        "keys": keys,
        "values": values,
        "key_scales": keys.view(torch.bfloat16) if is_int8 else keys,
        "value_scales": values.view(torch.bfloat16) if is_int8 else values,
        "layer": layer,
        "layer_items": keys.stride(0),
        "BLOCK_SIZE": block_size,
        "BLOCK_ITEMS": block_size * keys.shape[4],
    }
    new = {"key": key, "key_stride": key.stride(0), "value": value, "value_stride": value.stride(0)}
    places = {"blocks": blocks, "offsets": offsets, "faults": faults}
    yield Launch(kernels.store, (num_tokens, n_kv_heads), {**new, **cache, **places, **heads}, num_warps=1)

    read = {"context": context, "faults": faults, "query_starts": query_starts, "starts": starts, **heads}
    parts = {"sums": sums, "maxima": maxima, "totals": totals, "max_count": max_count}
    attending = {
        "query": query,
        "query_stride": query.stride(0),
        "tables": tables,
        "table_stride": tables.stride(0),
        "slopes": slopes,
        "scale": scale,
        "window": window,
        "GROUP": group,
        "HAS_WINDOW": window >= 0,
    }
    whole, split = prefill_tiling(group), decode_tiling(group)
    if len(whole_tiles):
        sizes = {"TILE_ROWS": whole.rows, "TILE_KEYS": whole.keys, "SPLIT_KEYS": 0}
        arguments = {**attending, **cache, **read, **parts, **sizes, "tiles": whole_tiles}
        yield Launch(kernels.attend, (len(whole_tiles), n_kv_heads, 1), arguments, whole.num_warps, whole.num_stages)
    for tiles in split_tiles.split(max(1, num_at_once)) if len(split_tiles) else ():
        sizes = {"TILE_ROWS": split.rows, "TILE_KEYS": split.keys, "SPLIT_KEYS": SPLIT_KEYS}
        arguments = {**attending, **cache, **read, **parts, **sizes, "tiles": tiles}
        grid = (len(tiles), n_kv_heads, splits)
        yield Launch(kernels.attend, grid, arguments, split.num_warps, split.num_stages)
        sizes = {"splits": splits, "TILE_TOKENS": split.tokens, "GROUP": group, "SPLIT_KEYS": SPLIT_KEYS}
        arguments = {**read, **parts, **sizes, "tiles": tiles}
        yield Launch(kernels.merge, (len(tiles), n_heads), arguments, num_warps=1)


def _paged_attention(query: Tensor, *arguments: Any) -> Tensor:
    context = query.new_empty(query.shape)
    for launch in launches(query, *arguments, context=context):
        launch()
    return context


def _shape_of_context(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


_LIBRARY.impl("paged_attention", _paged_attention, "CompositeExplicitAutograd")
_LIBRARY.impl("paged_attention", _shape_of_context, "Meta")

paged_attention = torch.ops.mpt_grpc.paged_attention.default
"""Takes the arguments of `launches` but the context [num_tokens, n_heads, head_dim], which it returns."""
