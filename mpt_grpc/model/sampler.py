"""Scores to token ids, vectorized over the batch.

Order, each step over what the one before has made of the scores:

1. repetition penalty, over prompt and output; frequency penalty, then presence penalty, over the output
2. logit bias
3. only the allowed tokens, only what the constraint's mask allows
4. without the forbidden tokens (end marks and stop tokens before `min_new_tokens`), unless nothing else is left
5. at temperature 0 the best token, the first among equals; else divide by the temperature
6. keep the top k, the top p, drop below min p, keep the typical
7. draw

The draw is the Gumbel-max trick with noise from a counter-based hash of (seed, output position, token id), so that it
depends on nothing but the request itself (https://arxiv.org/abs/1611.01144; the mixing constants are those of
splitmix64). What each step does is in `scores.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from mpt_grpc.errors import InternalError
from mpt_grpc.model.logprobs import token_logprobs
from mpt_grpc.model.scores import adjust, keep_likely, rows_at_once
from mpt_grpc.request import TokenLogprob
from mpt_grpc.step import SequenceStep, StepResult, TokenChoice

_NO_MASKS: Mapping[int, bytes] = MappingProxyType({})


class Sampler:
    """Chooses one token for each sequence of a step that has a choice. Keeps nothing from step to step."""

    def __init__(self, vocab_size: int) -> None:
        """`vocab_size` is the tokenizer's: the rows of the embedding beyond it are padding and never chosen."""
        self._vocab_size = vocab_size

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, sequences: Sequence[SequenceStep], masks: Mapping[int, bytes] = _NO_MASKS
    ) -> StepResult:
        """`logits` [n, at least vocab_size] of float32, not changed, a row for each of `sequences`; all have a choice.

        `masks`, by sequence id, are those of the constraints: token i may be chosen if bit i % 8 of byte i // 8 is set.
        A row that is not finite, or that a mask leaves nothing of, is an InternalError of its own sequence.
        """
        logits = logits[:, : self._vocab_size]
        choices = [sequence.choice for sequence in sequences if sequence.choice is not None]
        assert len(choices) == len(sequences)
        row_masks = {row: masks[s.sequence_id] for row, s in enumerate(sequences) if s.sequence_id in masks}
        scores = adjust(logits, choices, row_masks)
        chosen = _choose(scores, choices)
        is_finite = logits.amax(dim=-1).isfinite() & logits.amin(dim=-1).isfinite()  # NaN is both
        is_open = scores.gather(1, chosen[:, None])[:, 0] > -torch.inf
        # One transfer: on an accelerator each one waits for all that was asked before.
        rows = torch.stack([chosen, is_finite, is_open], dim=1).tolist()

        token_ids: dict[int, int] = {}
        errors: dict[int, Exception] = {}
        for sequence, (token_id, finite, open_) in zip(sequences, rows, strict=True):
            if not finite:
                errors[sequence.sequence_id] = InternalError("the model's scores are not finite")
            elif not open_:
                errors[sequence.sequence_id] = InternalError("the constraint allows no token")
            else:
                token_ids[sequence.sequence_id] = token_id
        return StepResult(token_ids, _logprobs(logits, sequences, token_ids), errors=errors)


def _logprobs(
    logits: Tensor, sequences: Sequence[SequenceStep], token_ids: Mapping[int, int]
) -> dict[int, TokenLogprob]:
    """By sequence id, of the chosen tokens for which they are asked."""
    asked = [
        (row, sequence.sequence_id, sequence.choice.num_top_logprobs)
        for row, sequence in enumerate(sequences)
        if sequence.choice is not None
        and sequence.choice.num_top_logprobs is not None
        and sequence.sequence_id in token_ids
    ]
    if not asked:
        return {}
    rows, ids, num_top = zip(*asked, strict=True)
    some = logits.index_select(0, torch.tensor(rows, device=logits.device))
    return dict(zip(ids, token_logprobs(some, [token_ids[i] for i in ids], num_top), strict=True))


def _choose(scores: Tensor, choices: Sequence[TokenChoice]) -> Tensor:
    """Returns a token for each row, [n] of int64; any where all scores are -inf."""
    drawn = [row for row, choice in enumerate(choices) if choice.sampling.temperature > 0]
    chosen = scores.argmax(dim=-1) if len(drawn) < len(choices) else scores.new_empty(len(scores), dtype=torch.int64)
    at_once = rows_at_once(scores)
    for start in range(0, len(drawn), at_once):
        some = drawn[start : start + at_once]
        rows = torch.tensor(some, device=scores.device)
        chosen[rows] = _draw(scores.index_select(0, rows), [choices[row] for row in some])
    return chosen


def _draw(scores: Tensor, choices: Sequence[TokenChoice]) -> Tensor:
    """Overwrites `scores`."""
    parameters = [choice.sampling for choice in choices]
    # A temperature under the smallest normal float32 would round to 0; from the best score down nothing overflows.
    tiny = torch.finfo(torch.float32).tiny
    temperatures = torch.tensor([max(p.temperature, tiny) for p in parameters], device=scores.device)
    scores.sub_(scores.amax(dim=-1, keepdim=True)).div_(temperatures[:, None])
    keep_likely(scores, parameters)
    return scores.add_(_gumbel(choices, scores.shape[1], scores.device)).argmax(dim=-1)


def _gumbel(choices: Sequence[TokenChoice], vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise [n, vocab_size]: a pure function of seed, output position and token id."""
    seeds = torch.tensor([_signed(choice.sampling.seed or 0) for choice in choices], device=device)
    positions = torch.tensor([choice.output_position for choice in choices], device=device)
    stream = _mix(seeds + _mix(positions + 1))
    tokens = torch.arange(1, vocab_size + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    bits = _mix(stream[:, None] + tokens[None, :]).bitwise_and_(0xFFFFFFFF)
    uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-32)
    # An exponential variate by log1p is exact near 0, where the winners are. 1 would give -inf, as if the token were
    # filtered out, so the largest float32 below 1 stands for it.
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer over int64, whose products wrap as those of uint64 do; overwrites `x`."""
    # In place throughout: on a CPU it is memory that this waits for.
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; int64's own shift copies the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
