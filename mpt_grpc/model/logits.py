"""Logits processing before sampling: penalties, biases and masks, then the filters.

See `sampler.py` for the order. Tokens that must not be chosen get -inf. Each row is processed only as its own request
specifies: options that no row uses cost nothing, and rows do not affect each other.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from mpt_grpc.model.transfer import send
from mpt_grpc.request import SamplingParameters
from mpt_grpc.step import SamplingInputs

_Tokens = Mapping[int, Collection[int]]
"""Token IDs by row; rows without any are left out."""

_NUCLEUS_WIDTH = 1024
"""How many of a row's top tokens are searched for a probability sum before the whole row is sorted."""


def is_adjusted(inputs: SamplingInputs) -> bool:
    """Whether `adjust` changes a row with these inputs, apart from its mask."""
    decoding = inputs.decoding
    penalties = (decoding.repetition_penalty - 1, decoding.frequency_penalty, decoding.presence_penalty)
    return any(penalties) or bool(decoding.logit_bias or decoding.allowed_token_ids or inputs.forbidden_token_ids)


def adjust(logits: Tensor, inputs: Sequence[SamplingInputs], masks: Mapping[int, bytes]) -> Tensor:
    """Applies penalties, biases and masks to float32 `logits` [n, vocab_size], as `inputs[i]` specifies for row i.

    `masks` maps rows to constraint masks. Returns a modified copy.
    """
    repeated = _tokens(
        inputs, lambda c: c.prompt_token_ids + c.output_token_ids if c.decoding.repetition_penalty != 1 else ()
    )
    counted = _tokens(inputs, lambda c: c.output_token_ids if c.decoding.frequency_penalty else ())
    present = _tokens(inputs, lambda c: c.output_token_ids if c.decoding.presence_penalty else ())
    biased = _tokens(inputs, lambda c: c.decoding.logit_bias)
    allowed = {row: one.decoding.allowed_mask for row, one in enumerate(inputs) if one.decoding.allowed_token_ids}
    forbidden = _tokens(inputs, lambda c: c.forbidden_token_ids)
    logits = logits.clone(memory_format=torch.contiguous_format)
    if repeated:
        _penalize_repetition(logits, repeated, [c.decoding.repetition_penalty for c in inputs])
    if counted:
        _penalize_frequency(logits, counted, [c.decoding.frequency_penalty for c in inputs])
    if present:
        _penalize_presence(logits, present, [c.decoding.presence_penalty for c in inputs])
    if biased:
        _add(logits, biased, [bias for row in biased for bias in inputs[row].decoding.logit_bias.values()])
    for excluding in (allowed, masks):
        if excluding:
            _mask(logits, excluding)
    if forbidden:
        _forbid(logits, forbidden)
    return logits


def apply_filters(logits: Tensor, parameters: Sequence[SamplingParameters]) -> None:
    """Applies top-k, top-p, min-p and typical-p, in this order, to `logits` [n, vocab_size]: drops tokens by -inf."""
    vocab_size = logits.shape[1]
    filters: tuple[tuple[Callable[[SamplingParameters], bool], _Filter], ...] = (
        (lambda p: 0 < p.top_k < vocab_size, _top_k),
        (lambda p: p.top_p < 1, _top_p),
        (lambda p: p.min_p > 0, _min_p),
        (lambda p: p.typical_p < 1, _typical),
    )
    for is_enabled, apply in filters:
        rows = [row for row, p in enumerate(parameters) if is_enabled(p)]
        if rows:
            indices = send(torch.tensor(rows), logits.device)
            filtered = apply(logits.index_select(0, indices), [parameters[row] for row in rows])
            logits.index_copy_(0, indices, filtered)


def top_tokens(logits: Tensor, count: int) -> Tensor:
    """Returns the IDs [n, count] of the highest float32 `logits` [n, vocab_size], ties ordered by ID."""
    return torch.cat([_top_tokens(part, count) for part in logits.split(rows_per_chunk(logits))])


def argmax(logits: Tensor) -> Tensor:
    """Returns the index of the first maximum of each row, int64 [n]."""
    # On a CPU, NumPy is four times as fast.
    return torch.from_numpy(logits.numpy().argmax(axis=-1)) if logits.is_cpu else logits.argmax(dim=-1)


def rows_per_chunk(logits: Tensor) -> int:
    """Returns how many rows of `logits` [n, vocab_size] to process at once where each logit needs several int64.

    This bounds memory, and on a CPU it halves the time: larger temporaries are returned to the system in between.
    """
    return max(1, (1 << 19 if logits.device.type == "cpu" else 1 << 22) // logits.shape[1])


def _top_tokens(logits: Tensor, count: int) -> Tensor:
    # The bits of floats sort like integers once those of negative numbers are flipped. Adding 0.0 turns -0.0 into 0.0.
    bits = (logits + 0.0).view(torch.int32)
    keys = bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).to(torch.int64).bitwise_left_shift_(32)
    return keys.sub_(torch.arange(logits.shape[1], device=logits.device)).topk(count, dim=-1).indices


def _penalize_repetition(logits: Tensor, tokens: _Tokens, penalties: Sequence[float]) -> None:
    """Penalizes as in https://arxiv.org/abs/1909.05858 (section 4.1); like transformers, multiplies negative logits."""
    cells, rows = _cells(logits, tokens)
    limits = torch.finfo(torch.float32)
    # A penalty close to 0 must not make logits infinite, since they could then no longer be compared.
    penalty = send(torch.tensor([max(p, limits.tiny) for p in penalties])[rows], logits.device)
    flat, indices = logits.view(-1), send(cells, logits.device)
    logit = flat[indices]
    flat[indices] = torch.where(logit < 0, logit * penalty, logit / penalty).clamp_(limits.min, limits.max)


def _penalize_frequency(logits: Tensor, tokens: _Tokens, penalties: Sequence[float]) -> None:
    """Penalizes as specified in https://platform.openai.com/docs/advanced-usage (frequency and presence penalties)."""
    cells, counts = _cells(logits, tokens)[0].unique(return_counts=True)
    penalty = torch.tensor(penalties)[cells // logits.shape[1]] * counts
    logits.view(-1)[send(cells, logits.device)] -= send(penalty, logits.device)


def _penalize_presence(logits: Tensor, tokens: _Tokens, penalties: Sequence[float]) -> None:
    cells, rows = _cells(logits, tokens)
    # A token that occurs twice is written twice, with the same logit.
    logits.view(-1)[send(cells, logits.device)] -= send(torch.tensor(penalties)[rows], logits.device)


def _add(logits: Tensor, tokens: _Tokens, biases: Sequence[float]) -> None:
    cells, _ = _cells(logits, tokens)
    logits.view(-1)[send(cells, logits.device)] += send(torch.tensor(biases), logits.device)


def _mask(logits: Tensor, masks: Mapping[int, bytes]) -> None:
    device, vocab_size = logits.device, logits.shape[1]
    num_bytes = (vocab_size + 7) // 8
    packed = bytearray().join(mask[:num_bytes].ljust(num_bytes, b"\0") for mask in masks.values())
    octets = send(torch.frombuffer(packed, dtype=torch.uint8), device).to(torch.int32)
    # For each value of an octet, what it adds to the logits of its eight tokens.
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    addends = torch.zeros(256, 8, device=device).masked_fill_(bits == 0, -torch.inf)
    addend = addends.index_select(0, octets).view(len(masks), 8 * num_bytes)[:, :vocab_size]
    logits.index_add_(0, send(torch.tensor(list(masks)), device), addend)


def _forbid(logits: Tensor, tokens: _Tokens) -> None:
    cells, rows = _cells(logits, tokens)
    flat, indices = logits.view(-1), send(cells, logits.device)
    before = flat[indices]
    flat.index_fill_(0, indices, -torch.inf)  # assignment would copy the number to a GPU, and wait for that
    # A row with no other token left keeps its forbidden tokens.
    affected = send(torch.tensor(list(tokens)), logits.device)
    is_empty = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    is_empty[affected] = logits.index_select(0, affected).amax(dim=-1) == -torch.inf
    flat[indices] = torch.where(is_empty[send(rows, logits.device)], before, -torch.inf)


def _tokens(inputs: Sequence[SamplingInputs], select: Callable[[SamplingInputs], Collection[int]]) -> _Tokens:
    return {row: tokens for row, one in enumerate(inputs) if (tokens := select(one))}


def _cells(logits: Tensor, tokens: _Tokens) -> tuple[Tensor, Tensor]:
    """Returns the indices of `tokens` in the flattened `logits` and their rows, both [m] int64 on the CPU."""
    ids = array("q")
    for row_tokens in tokens.values():
        ids.extend(row_tokens)
    lengths = torch.tensor([len(row_tokens) for row_tokens in tokens.values()])
    rows = torch.tensor(list(tokens)).repeat_interleave(lengths)
    return rows * logits.shape[1] + torch.frombuffer(ids, dtype=torch.int64), rows


_Filter = Callable[[Tensor, Sequence[SamplingParameters]], Tensor]
"""Takes logits [n, vocab_size] and the parameters of each row; returns the logits with the dropped tokens at -inf."""


def _top_k(logits: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    top_k = [p.top_k for p in parameters]
    tokens = top_tokens(logits, max(top_k))
    ranks = torch.arange(tokens.shape[1], device=logits.device)
    return _keep(logits, tokens, ranks < send(torch.tensor(top_k), logits.device)[:, None])


def _top_p(logits: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    """Nucleus sampling: https://arxiv.org/abs/1904.09751."""
    return _keep_sum(logits, logits, [p.top_p for p in parameters])


def _min_p(logits: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    """Drops tokens with p < min_p x p_max, computed in logarithms: https://arxiv.org/abs/2407.01082."""
    log_min_p = send(torch.tensor([p.min_p for p in parameters]), logits.device).log()
    return torch.where(logits < logits.amax(dim=-1, keepdim=True) + log_min_p[:, None], -torch.inf, logits)


def _typical(logits: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    """Keeps the tokens whose surprise is closest to the expected one: https://arxiv.org/abs/2202.00666."""
    logprobs = logits.log_softmax(dim=-1)
    terms = logprobs.exp() * logprobs.clamp(min=torch.finfo(torch.float32).min)  # 0 x -inf would be NaN
    entropy = -_row_sums(terms)[:, None].to(torch.float32)
    return _keep_sum(logits, -(logprobs + entropy).abs_(), [p.typical_p for p in parameters])


def _row_sums(values: Tensor) -> Tensor:
    """Returns the sum of each row, [n] float64, which is the same in any batch."""
    # On a CPU sum() splits a single row among threads, which rounds differently than in a batch; cumsum() does not.
    return values.cumsum(dim=-1, dtype=torch.float64)[:, -1]


def _keep_sum(logits: Tensor, order: Tensor, sums: Sequence[float]) -> Tensor:
    """Keeps the fewest tokens of each row, in descending `order`, whose probabilities reach the row's sum."""
    targets = send(torch.tensor(sums, dtype=torch.float64), logits.device)
    if not logits.is_cpu:
        # Sorting all tokens is cheap there; reading back whether fewer suffice would stop the host.
        return _keep_sum_among(logits.shape[1], logits, order, targets)[0]
    kept, reached = _keep_sum_among(_NUCLEUS_WIDTH, logits, order, targets)
    short = (reached < targets).nonzero()[:, 0]
    if len(short):
        kept[short], _ = _keep_sum_among(logits.shape[1], logits[short], order[short], targets[short])
    return kept


def _keep_sum_among(width: int, logits: Tensor, order: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Like `_keep_sum`, among the `width` highest of `order`; also returns their probability sums, [n] float64."""
    tokens = top_tokens(order, min(width, logits.shape[1]))
    # In float64 the result does not depend on the order in which a device adds, and sums of equal numbers are exact.
    powers = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    own = powers.gather(1, tokens).to(torch.float64)
    reached, total = own.cumsum(dim=-1), _row_sums(powers)
    is_kept = reached - own < (targets * total)[:, None]
    is_kept[:, 0] = True
    return _keep(logits, tokens, is_kept), reached[:, -1] / total


def _keep(logits: Tensor, tokens: Tensor, is_kept: Tensor) -> Tensor:
    """Returns the logits of those of `tokens` [n, k] where `is_kept` [n, k] is true; all others are -inf."""
    kept = logits.gather(1, tokens).masked_fill_(~is_kept, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter_(1, tokens, kept)
