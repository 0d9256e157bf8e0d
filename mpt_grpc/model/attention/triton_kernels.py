"""Attention over the paged cache on a GPU, in Triton: `store` writes a step's keys and values, the others attend.

The rows of a tile are the queries of consecutive tokens of one sequence, one row for each head that shares a key head.
Scores are in base 2: `slopes` and `scale` are multiplied by log2(e). The oracle is `TorchAttention`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpt_grpc.model.triton_launch import jit

_jit = jit(
    varying=("layer", "table_stride", "window", "max_count", "splits"),
    unaligned=("blocks", "offsets", "query_starts", "starts", "tables", "tiles"),
)


@_jit
def store(
    key,
    key_stride,
    value,
    value_stride,
    keys,
    values,
    key_scales,
    value_scales,
    layer,
    layer_items,
    blocks,
    offsets,
    faults,
    N_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
):
    """Stores a token's key and value of one head; grid [num_tokens, N_KV_HEADS].

    What is not finite is stored as 0, and its `faults` [num_tokens, N_KV_HEADS], float32, are NaN; others are 0.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    start = layer.to(tl.int64) * layer_items + (tl.load(blocks + token) * N_KV_HEADS + head) * BLOCK_ITEMS
    offset = tl.load(offsets + token)
    x = tl.load(key + token * key_stride + head * HEAD_DIM + dims, mask=is_dim, other=0.0).to(tl.float32)
    y = tl.load(value + token * value_stride + head * HEAD_DIM + dims, mask=is_dim, other=0.0).to(tl.float32)
    x_is_finite, y_is_finite = tl.abs(x) < float("inf"), tl.abs(y) < float("inf")
    x, y = tl.where(x_is_finite, x, 0.0), tl.where(y_is_finite, y, 0.0)
    if keys.dtype.element_ty == tl.int8:
        # The scales follow the block's items of the head; of two bytes each, they are addressed in units of two.
        scale_at = (start + BLOCK_SIZE * HEAD_DIM) // 2 + offset
        x = _rounded(x, key_scales + scale_at)
        y = _rounded(y, value_scales + scale_at)
    to = start + offset * HEAD_DIM + dims
    tl.store(keys + to, x.to(keys.dtype.element_ty), mask=is_dim)
    tl.store(values + to, y.to(values.dtype.element_ty), mask=is_dim)
    num_faults = tl.sum((~(x_is_finite & y_is_finite)).to(tl.int32), axis=0)
    tl.store(faults + token * N_KV_HEADS + head, tl.where(num_faults > 0, float("nan"), 0.0))


@triton.jit
def _rounded(x, scale_at):
    """Returns x in units of a scale, as integers in [-127, 127], and stores the scale."""
    # Rounded up, so that nothing exceeds 127; not so small that its inverse is infinite.
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) * (1.01 / 127), 1e-30).to(tl.bfloat16)
    tl.store(scale_at, scale)
    units = x / scale.to(tl.float32)
    return tl.floor(units + 0.5)


@_jit
def attend(
    query,
    query_stride,
    context,
    keys,
    values,
    key_scales,
    value_scales,
    layer,
    layer_items,
    faults,
    query_starts,
    starts,
    tables,
    table_stride,
    tiles,
    slopes,
    scale,
    window,
    sums,
    maxima,
    totals,
    max_count,
    N_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Attends from one tile of queries to one key head; grid [num_tiles, N_KV_HEADS, splits].

    `tiles` [num_tiles, 2] has the sequence of each tile and its first token within the sequence's part of the step.
    With SPLIT_KEYS, a program attends to one split of the context, and `merge` combines the splits. A split has a fixed
    number of keys, so a token's result depends neither on other sequences nor on the tokens of its own in its tile.
    Without, there is one split. Tokens attend to at most `window` tokens before them, if HAS_WINDOW.
    """
    TILE_TOKENS: tl.constexpr = TILE_ROWS // GROUP
    tile, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1).to(tl.int32)
    step_start = tl.load(query_starts + sequence)
    count = (tl.load(query_starts + sequence + 1) - step_start).to(tl.int32)
    start = tl.load(starts + sequence).to(tl.int32)
    last = tl.minimum(first + TILE_TOKENS, count)
    lowest, end = 0, start + last
    if SPLIT_KEYS > 0:
        lowest = tl.program_id(2) * SPLIT_KEYS
        if lowest >= end:
            return
        end = tl.minimum(lowest + SPLIT_KEYS, end)
    if HAS_WINDOW:
        lowest = tl.maximum(lowest, (start + first - window) // TILE_KEYS * TILE_KEYS)

    rows = tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, PADDED_DIM)
    tokens = first + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    is_row = (rows < TILE_TOKENS * GROUP) & (tokens < last)
    is_item = is_row[:, None] & (dims[None, :] < HEAD_DIM)
    positions = start + tokens
    slope = tl.load(slopes + heads, mask=is_row, other=0.0)
    row_tokens = step_start + tokens
    item = row_tokens[:, None] * query_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(query + item, mask=is_item, other=0.0)

    table = tables + sequence * table_stride
    layer_start = layer.to(tl.int64) * layer_items
    highest = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)
    for at in range(lowest, end, TILE_KEYS):
        places = at + tl.arange(0, TILE_KEYS)
        is_key = places < end
        blocks = tl.load(table + places // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        block_starts = layer_start + (blocks * N_KV_HEADS + kv_head) * BLOCK_ITEMS
        from_ = block_starts + places % BLOCK_SIZE * HEAD_DIM
        is_dim = dims < HEAD_DIM
        k = tl.load(keys + from_[None, :] + dims[:, None], mask=is_key[None, :] & is_dim[:, None], other=0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        if keys.dtype.element_ty == tl.int8:
            scale_at = (block_starts + BLOCK_SIZE * HEAD_DIM) // 2 + places % BLOCK_SIZE
            scores *= tl.load(key_scales + scale_at, mask=is_key, other=0.0).to(tl.float32)[None, :]
        distance = places[None, :] - positions[:, None]
        is_visible = (distance <= 0) & is_key[None, :]
        if HAS_WINDOW:
            is_visible &= distance >= -window
        scores = tl.where(is_visible, scores + slope[:, None] * distance, float("-inf"))

        raised = tl.maximum(highest, tl.max(scores, axis=1))
        # A row may not see any key yet; subtracting its maximum of -inf would give NaN.
        base = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(highest - base)
        total = total * decay + tl.sum(weights, axis=1)
        highest = raised
        v = tl.load(values + from_[:, None] + dims[None, :], mask=is_key[:, None] & is_dim[None, :], other=0)
        if values.dtype.element_ty == tl.int8:
            scale_at = (block_starts + BLOCK_SIZE * HEAD_DIM) // 2 + places % BLOCK_SIZE
            weights *= tl.load(value_scales + scale_at, mask=is_key, other=0.0).to(tl.float32)[None, :]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")

    if SPLIT_KEYS > 0:
        n_heads = N_KV_HEADS * GROUP
        part = ((tile * max_count + rows // GROUP) * n_heads + heads) * tl.num_programs(2) + tl.program_id(2)
        tl.store(maxima + part, highest, mask=is_row)
        tl.store(totals + part, total, mask=is_row)
        tl.store(sums + part[:, None] * HEAD_DIM + dims[None, :], acc, mask=is_item)
    else:
        fault = tl.load(faults + row_tokens * N_KV_HEADS + kv_head, mask=is_row, other=0.0)
        acc = acc / total[:, None] + fault[:, None]
        to = (row_tokens[:, None] * (N_KV_HEADS * GROUP) + heads[:, None]) * HEAD_DIM + dims[None, :]
        tl.store(context + to, acc.to(context.dtype.element_ty), mask=is_item)


@_jit
def merge(
    sums,
    maxima,
    totals,
    splits,
    max_count,
    context,
    faults,
    query_starts,
    starts,
    tiles,
    N_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
):
    """Combines the splits of `attend`; grid [num_tiles, n_heads].

    `sums` [num_tiles, max_count, n_heads, splits, HEAD_DIM] are those of values weighted by 2^(score - maximum);
    `maxima` and `totals`, the sums of the weights, have no last dimension. What a tile does not have is undefined.
    """
    LANES: tl.constexpr = 8
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1).to(tl.int32)
    n_heads = N_KV_HEADS * GROUP
    step_start = tl.load(query_starts + sequence)
    last = tl.minimum(first + TILE_TOKENS, (tl.load(query_starts + sequence + 1) - step_start).to(tl.int32))
    num_splits = tl.cdiv(tl.load(starts + sequence).to(tl.int32) + last, SPLIT_KEYS)
    dims = tl.arange(0, PADDED_DIM)
    is_dim = dims < HEAD_DIM
    for token in range(first, last):
        part = ((tile * max_count + token - first) * n_heads + head) * splits
        highest = tl.full([LANES], float("-inf"), tl.float32)
        total = tl.zeros([LANES], tl.float32)
        acc = tl.zeros([LANES, PADDED_DIM], tl.float32)
        for at in range(0, num_splits, LANES):
            split = at + tl.arange(0, LANES)
            is_split = split < num_splits
            maximum = tl.load(maxima + part + split, mask=is_split, other=float("-inf"))
            raised = tl.maximum(highest, maximum)
            base = tl.where(raised == float("-inf"), 0.0, raised)
            decay, weight = tl.exp2(highest - base), tl.exp2(maximum - base)
            total = total * decay + tl.load(totals + part + split, mask=is_split, other=0.0) * weight
            from_ = (part + split)[:, None] * HEAD_DIM + dims[None, :]
            terms = tl.load(sums + from_, mask=is_split[:, None] & is_dim[None, :], other=0.0)
            acc = acc * decay[:, None] + terms * weight[:, None]
            highest = raised
        weight = tl.exp2(highest - tl.max(highest, axis=0))
        result = tl.sum(acc * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
        result += tl.load(faults + (step_start + token) * N_KV_HEADS + head // GROUP)
        to = ((step_start + token) * n_heads + head) * HEAD_DIM + dims
        tl.store(context + to, result.to(context.dtype.element_ty), mask=is_dim)
