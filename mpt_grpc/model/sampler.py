"""Scores to token ids, vectorized over the batch.

Order: divide by the temperature, keep the top k, keep the top p, drop below min p, draw. The draw is the Gumbel-max
trick with noise from a counter-based hash of (seed, output position, token id), so that it depends on nothing but the
request itself (https://arxiv.org/abs/1611.01144; the mixing constants are those of splitmix64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpt_grpc.errors import InternalError
from mpt_grpc.request import SamplingParameters
from mpt_grpc.step import SequenceStep, StepResult


class Sampler:
    """Chooses one token for each sequence of a step that samples."""

    def __init__(self, vocab_size: int) -> None:
        """`vocab_size` is the tokenizer's: the rows of the embedding beyond it are padding and never chosen."""
        self._vocab_size = vocab_size

    def sample(self, logits: Tensor, sequences: Sequence[SequenceStep]) -> StepResult:
        """`logits` [n, at least vocab_size] of float32, a row for each of `sequences`.

        A row that is not finite is an InternalError of its own sequence.
        """
        logits = logits[:, : self._vocab_size]
        finite = logits.isfinite().all(dim=-1).tolist()
        chosen = logits.argmax(dim=-1)
        drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
        if drawn:
            rows = torch.tensor(drawn, device=logits.device)
            chosen[rows] = _draw(logits[rows], [sequences[row] for row in drawn])
        token_ids = chosen.tolist()
        return StepResult(
            token_ids={s.request_id: token for s, token, ok in zip(sequences, token_ids, finite, strict=True) if ok},
            errors={
                s.request_id: InternalError("the model's scores are not finite")
                for s, ok in zip(sequences, finite, strict=True)
                if not ok
            },
        )


def _draw(logits: Tensor, sequences: Sequence[SequenceStep]) -> Tensor:
    parameters = [sequence.sampling for sequence in sequences]
    device = logits.device
    # A temperature under the smallest normal float32 would round to 0; from the best score down nothing overflows.
    tiny = torch.finfo(torch.float32).tiny
    temperatures = torch.tensor([max(p.temperature, tiny) for p in parameters], device=device)
    scores = _filter((logits - logits.amax(dim=-1, keepdim=True)) / temperatures[:, None], parameters)
    return (scores + _gumbel(sequences, logits.shape[1], device)).argmax(dim=-1)


def _filter(scores: Tensor, parameters: Sequence[SamplingParameters]) -> Tensor:
    """Sets what the filters drop to -inf; rows without a filter, and filters that no row has, cost nothing."""
    vocab_size = scores.shape[1]
    sorting = [row for row, p in enumerate(parameters) if 0 < p.top_k < vocab_size or p.top_p < 1]
    if sorting:
        rows = torch.tensor(sorting, device=scores.device)
        some = [parameters[row] for row in sorting]
        ordered, order = scores[rows].sort(dim=-1, descending=True, stable=True)
        top_k = torch.tensor([p.top_k or vocab_size for p in some], device=scores.device)
        ordered = ordered.masked_fill(torch.arange(vocab_size, device=scores.device) >= top_k[:, None], -torch.inf)
        top_p = torch.tensor([p.top_p for p in some], device=scores.device)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        dropped = (before >= top_p[:, None]) & (top_p[:, None] < 1)
        dropped[:, 0] = False
        ordered = ordered.masked_fill(dropped, -torch.inf)
        scores[rows] = torch.empty_like(ordered).scatter_(1, order, ordered)
    if any(p.min_p > 0 for p in parameters):
        # p < min_p x p_max, as logarithms; log 0 is -inf, which drops nothing.
        floor = torch.tensor([p.min_p for p in parameters], device=scores.device).log()
        scores = scores.masked_fill(scores < scores.amax(dim=-1, keepdim=True) + floor[:, None], -torch.inf)
    return scores


def _gumbel(sequences: Sequence[SequenceStep], vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise [n, vocab_size]: a pure function of seed, output position and token id."""
    seeds = torch.tensor([_signed(s.sampling.seed or 0) for s in sequences], device=device)
    positions = torch.tensor([s.output_position for s in sequences], device=device)
    stream = _mix(seeds + _mix(positions + 1))
    tokens = torch.arange(1, vocab_size + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    bits = _mix(stream[:, None] + tokens[None, :]) & 0xFFFFFFFF
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    # An exponential variate by log1p is exact near 0, where the winners are. 1 would give -inf, as if the token were
    # filtered out, so the largest float32 below 1 stands for it.
    return -(-torch.log1p(-uniform.clamp_(max=1 - 2.0**-24))).log()


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer over int64, whose products wrap as those of uint64 do."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; int64's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
