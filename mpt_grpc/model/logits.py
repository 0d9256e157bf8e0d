"""What is done to the scores before a token is drawn: penalties, biases and bans, then the filters.

The order is told in `sampler.py`. What may not be chosen gets -inf. A row is touched only for what it asks, what no row
asks costs nothing, and no row has a say in another's result.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from mpt_grpc.request import SamplingParameters
from mpt_grpc.step import SamplingInputs

_Tokens = Mapping[int, Collection[int]]
"""By row; a row that has none is left out."""

_NUCLEUS_WIDTH = 1024
"""So many of a row's best tokens are searched for a sum of probabilities before all of them are sorted."""


def adjust(logits: Tensor, choices: Sequence[SamplingInputs], masks: Mapping[int, bytes]) -> Tensor:
    """Returns what `choices`, one a row, make of the float32 scores `logits` [n, vocab_size] before one is drawn.

    `masks` are by row. `logits` is not changed, and is what is returned if there is nothing to do.
    """
    repeated = _tokens(
        choices, lambda c: c.prompt_token_ids + c.output_token_ids if c.decoding.repetition_penalty != 1 else ()
    )
    counted = _tokens(choices, lambda c: c.output_token_ids if c.decoding.frequency_penalty else ())
    present = _tokens(choices, lambda c: c.output_token_ids if c.decoding.presence_penalty else ())
    biased = _tokens(choices, lambda c: c.decoding.logit_bias)
    allowed = _tokens(choices, lambda c: c.decoding.allowed_token_ids)
    forbidden = _tokens(choices, lambda c: c.forbidden_token_ids)
    if not (repeated or counted or present or biased or allowed or masks or forbidden):
        return logits
    scores = logits.clone(memory_format=torch.contiguous_format)
    if repeated:
        _penalize_repetition(scores, repeated, [c.decoding.repetition_penalty for c in choices])
    if counted:
        _penalize_frequency(scores, counted, [c.decoding.frequency_penalty for c in choices])
    if present:
        _penalize_presence(scores, present, [c.decoding.presence_penalty for c in choices])
    if biased:
        _add(scores, biased, [bias for row in biased for bias in choices[row].decoding.logit_bias.values()])
    if allowed:
        _allow(scores, allowed)
    if masks:
        _mask(scores, masks)
    if forbidden:
        _forbid(scores, forbidden)
    return scores


def keep_likely(scores: Tensor, parameters: Sequence[SamplingParameters]) -> None:
    """Sets to -inf what top-k, top-p, min-p and typical-p, one after the other, drop of `scores` [n, vocab_size]."""
    vocab_size = scores.shape[1]
    filters: tuple[tuple[Callable[[SamplingParameters], bool], _Filter], ...] = (
        (lambda p: 0 < p.top_k < vocab_size, _top_k),
        (lambda p: p.top_p < 1, _top_p),
        (lambda p: p.min_p > 0, _min_p),
        (lambda p: p.typical_p < 1, _typical),
    )
    for is_asked, keep in filters:
        rows = [row for row, p in enumerate(parameters) if is_asked(p)]
        if rows:
            at = torch.tensor(rows, device=scores.device)
            scores.index_copy_(0, at, keep(scores.index_select(0, at), [parameters[row] for row in rows]))


def best(scores: Tensor, count: int) -> Tensor:
    """Returns the ids [n, count] of the highest float32 `scores` [n, vocab_size], among equals the lower first."""
    return torch.cat([_best(part, count) for part in scores.split(rows_per_chunk(scores))])


def rows_per_chunk(scores: Tensor) -> int:
    """How many rows of `scores` [n, vocab_size] to take at once where each score needs several int64.

    It bounds the memory; and a CPU takes twice as long where the allocator gives memory back in between.
    """
    return max(1, (1 << 19 if scores.device.type == "cpu" else 1 << 22) // scores.shape[1])


def _best(scores: Tensor, count: int) -> Tensor:
    # A float's bits order as an integer's do once those of negative numbers are turned over; 0.0 + -0.0 is 0.0.
    bits = (scores + 0.0).view(torch.int32)
    keys = bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).to(torch.int64).bitwise_left_shift_(32)
    return keys.sub_(torch.arange(scores.shape[1], device=scores.device)).topk(count, dim=-1).indices


def _penalize_repetition(scores: Tensor, tokens: _Tokens, penalties: Sequence[float]) -> None:
    """https://arxiv.org/abs/1909.05858, section 4.1, with negative scores multiplied as transformers does."""
    cells, rows = _cells(scores, tokens)
    limits = torch.finfo(torch.float32)
    # A penalty next to 0 must not make a score infinite, which would leave nothing to compare.
    penalty = torch.tensor([max(p, limits.tiny) for p in penalties])[rows].to(scores.device)
    flat, at = scores.view(-1), cells.to(scores.device)
    score = flat[at]
    flat[at] = torch.where(score < 0, score * penalty, score / penalty).clamp_(limits.min, limits.max)


def _penalize_frequency(scores: Tensor, tokens: _Tokens, penalties: Sequence[float]) -> None:
    """https://platform.openai.com/docs/advanced-usage (frequency and presence penalties)."""
    cells, counts = _cells(scores, tokens)[0].unique(return_counts=True)
    penalty = torch.tensor(penalties)[cells // scores.shape[1]] * counts
    scores.view(-1)[cells.to(scores.device)] -= penalty.to(scores.device)


def _penalize_presence(scores: Tensor, tokens: _Tokens, penalties: Sequence[float]) -> None:
    cells, rows = _cells(scores, tokens)
    # A token that comes twice is written twice, with the same score.
    scores.view(-1)[cells.to(scores.device)] -= torch.tensor(penalties)[rows].to(scores.device)


def _add(scores: Tensor, tokens: _Tokens, biases: Sequence[float]) -> None:
    cells, _ = _cells(scores, tokens)
    scores.view(-1)[cells.to(scores.device)] += torch.tensor(biases, device=scores.device)


def _allow(scores: Tensor, tokens: _Tokens) -> None:
    flat, at = scores.view(-1), _cells(scores, tokens)[0].to(scores.device)
    allowed = flat[at]
    scores[torch.tensor(list(tokens), device=scores.device)] = -torch.inf
    flat[at] = allowed


def _mask(scores: Tensor, masks: Mapping[int, bytes]) -> None:
    device, vocab_size = scores.device, scores.shape[1]
    num_bytes = (vocab_size + 7) // 8
    packed = bytearray().join(mask[:num_bytes] for mask in masks.values())
    octets = torch.frombuffer(packed, dtype=torch.uint8).to(device).to(torch.int32)
    # What an octet adds to the scores of its eight tokens.
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    addends = torch.zeros(256, 8, device=device).masked_fill_(bits == 0, -torch.inf)
    addend = addends.index_select(0, octets).view(len(masks), 8 * num_bytes)[:, :vocab_size]
    scores.index_add_(0, torch.tensor(list(masks), device=device), addend)


def _forbid(scores: Tensor, tokens: _Tokens) -> None:
    cells, rows = _cells(scores, tokens)
    flat, at = scores.view(-1), cells.to(scores.device)
    before = flat[at]
    flat[at] = -torch.inf
    # A row that would have nothing left keeps what it had.
    some = torch.tensor(list(tokens), device=scores.device)
    is_empty = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    is_empty[some] = scores.index_select(0, some).amax(dim=-1) == -torch.inf
    flat[at] = torch.where(is_empty[rows.to(scores.device)], before, -torch.inf)


def _tokens(choices: Sequence[SamplingInputs], of: Callable[[SamplingInputs], Collection[int]]) -> _Tokens:
    return {row: tokens for row, choice in enumerate(choices) if (tokens := of(choice))}


def _cells(scores: Tensor, tokens: _Tokens) -> tuple[Tensor, Tensor]:
    """The places of `tokens` in the flattened `scores` and their rows, both [m] of int64 on the CPU."""
    ids = array("q")
    for some in tokens.values():
        ids.extend(some)
    lengths = torch.tensor([len(some) for some in tokens.values()])
    rows = torch.tensor(list(tokens)).repeat_interleave(lengths)
    return rows * scores.shape[1] + torch.frombuffer(ids, dtype=torch.int64), rows


_Filter = Callable[[Tensor, Sequence[SamplingParameters]], Tensor]
"""Of some rows' scores [n, vocab_size] and their parameters, one a row; what it drops is -inf in what it returns."""


def _top_k(scores: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    top_k = [p.top_k for p in parameters]
    tokens = best(scores, max(top_k))
    places = torch.arange(tokens.shape[1], device=scores.device)
    return _keep(scores, tokens, places < torch.tensor(top_k, device=scores.device)[:, None])


def _top_p(scores: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    """https://arxiv.org/abs/1904.09751."""
    return _keep_sum(scores, scores, [p.top_p for p in parameters])


def _min_p(scores: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    """https://arxiv.org/abs/2407.01082: p < min_p x p_max is dropped, here as logarithms."""
    floor = torch.tensor([p.min_p for p in parameters], device=scores.device).log()
    return torch.where(scores < scores.amax(dim=-1, keepdim=True) + floor[:, None], -torch.inf, scores)


def _typical(scores: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    """https://arxiv.org/abs/2202.00666: the tokens whose surprise is closest to the expected one."""
    logprobs = scores.log_softmax(dim=-1)
    # On a CPU sum() splits a lone row among threads, which rounds otherwise than in a batch; cumsum() does not.
    surprise = logprobs.exp() * logprobs.clamp(min=torch.finfo(torch.float32).min)  # 0 x -inf is not a number
    entropy = -surprise.cumsum(dim=-1, dtype=torch.float64)[:, -1:].to(torch.float32)
    return _keep_sum(scores, -(logprobs + entropy).abs_(), [p.typical_p for p in parameters])


def _keep_sum(scores: Tensor, order: Tensor, sums: Sequence[float]) -> Tensor:
    """Keeps of each row the fewest tokens, the highest `order` first, whose probabilities reach its sum."""
    wanted = torch.tensor(sums, dtype=torch.float64, device=scores.device)
    kept, reached = _keep_sum_among(_NUCLEUS_WIDTH, scores, order, wanted)
    short = (reached < wanted).nonzero()[:, 0]
    if len(short):
        kept[short], _ = _keep_sum_among(scores.shape[1], scores[short], order[short], wanted[short])
    return kept


def _keep_sum_among(width: int, scores: Tensor, order: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Looks only at the `width` highest of `order`; also returns the sum of their probabilities, [n] of float64."""
    tokens = best(order, min(width, scores.shape[1]))
    # In float64 it does not show in which order a device adds.
    probabilities = scores.softmax(dim=-1).gather(1, tokens).to(torch.float64)
    reached = probabilities.cumsum(dim=-1)
    inside = reached - probabilities < wanted[:, None]
    inside[:, 0] = True
    return _keep(scores, tokens, inside), reached[:, -1]


def _keep(scores: Tensor, tokens: Tensor, inside: Tensor) -> Tensor:
    """The scores of those of `tokens` [n, k] that are `inside` [n, k]; all others are -inf."""
    kept = scores.gather(1, tokens).masked_fill_(~inside, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter_(1, tokens, kept)
