"""Samples a token ID from each row of logits, vectorized over the batch.

The logits are processed in this order:

1. repetition penalty over prompt and output; frequency penalty, then presence penalty, over the output
2. logit bias
3. removal of all tokens but the allowed ones, and of those that the constraint's mask excludes
4. removal of the forbidden tokens (end-of-sequence and stop tokens before `min_new_tokens`), unless no other is left
5. at temperature 0 the highest logit wins, the lowest ID among equals; otherwise, division by the temperature
6. top-k, top-p, min-p and typical-p filtering
7. random sampling

Sampling uses the Gumbel-max trick with noise from a counter-based hash of (seed, output position, token ID), so that
it depends only on the request itself (https://arxiv.org/abs/1611.01144; the mixing constants are those of splitmix64).
Steps 1 to 4 and 6 are implemented in `logits.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from mpt_grpc.errors import InternalError
from mpt_grpc.model.logits import adjust, apply_filters, rows_per_chunk
from mpt_grpc.model.logprobs import token_logprobs
from mpt_grpc.request import TokenLogprob
from mpt_grpc.step import SamplingInputs, SequenceStep, StepResult

_NO_MASKS: Mapping[int, bytes] = MappingProxyType({})


class Sampler:
    """Chooses the next token of each sequence of a step that is to get one. Keeps no state between steps."""

    def __init__(self, vocab_size: int) -> None:
        """`vocab_size` is that of the tokenizer: token IDs beyond it are padding of the embedding and never chosen."""
        self._vocab_size = vocab_size

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, sequences: Sequence[SequenceStep], masks: Mapping[int, bytes] = _NO_MASKS
    ) -> StepResult:
        """Samples one token per row of `logits` [n, at least vocab_size], float32; `logits` is not modified.

        Row i belongs to `sequences[i]`; all of these must have sampling inputs. `masks` maps sequence IDs to constraint
        masks: token i is allowed if bit i % 8 of byte i // 8 is set. If a row is not finite or its mask allows no
        token, an InternalError is returned for that sequence only.
        """
        logits = logits[:, : self._vocab_size]
        inputs = [sequence.sampling for sequence in sequences if sequence.sampling is not None]
        assert len(inputs) == len(sequences)
        row_masks = {row: masks[s.sequence_id] for row, s in enumerate(sequences) if s.sequence_id in masks}
        processed = adjust(logits, inputs, row_masks)
        chosen = _choose(processed, inputs)
        is_finite = logits.amax(dim=-1).isfinite() & logits.amin(dim=-1).isfinite()  # both propagate NaN
        is_allowed = processed.gather(1, chosen[:, None])[:, 0] > -torch.inf
        # One transfer instead of three: on an accelerator each transfer waits for all work queued before it.
        rows = torch.stack([chosen, is_finite, is_allowed], dim=1).tolist()

        token_ids: dict[int, int] = {}
        errors: dict[int, Exception] = {}
        for sequence, (token_id, finite, allowed) in zip(sequences, rows, strict=True):
            if not finite:
                errors[sequence.sequence_id] = InternalError("the model's logits are not finite")
            elif not allowed:
                errors[sequence.sequence_id] = InternalError("the constraint allows no token")
            else:
                token_ids[sequence.sequence_id] = token_id
        return StepResult(token_ids, _logprobs(logits, sequences, token_ids), errors=errors)


def _logprobs(
    logits: Tensor, sequences: Sequence[SequenceStep], token_ids: Mapping[int, int]
) -> dict[int, TokenLogprob]:
    """Returns the log probabilities of the chosen tokens, by sequence ID, for the sequences that requested them."""
    requested = [
        (row, sequence.sequence_id, sequence.sampling.num_top_logprobs)
        for row, sequence in enumerate(sequences)
        if sequence.sampling is not None
        and sequence.sampling.num_top_logprobs is not None
        and sequence.sequence_id in token_ids
    ]
    if not requested:
        return {}
    rows, ids, num_top = zip(*requested, strict=True)
    selected = logits.index_select(0, torch.tensor(rows, device=logits.device))
    return dict(zip(ids, token_logprobs(selected, [token_ids[i] for i in ids], num_top), strict=True))


def _choose(logits: Tensor, inputs: Sequence[SamplingInputs]) -> Tensor:
    """Returns a token for each row, [n] int64; the token is arbitrary where all logits are -inf."""
    sampled = [row for row, one in enumerate(inputs) if one.parameters.temperature > 0]
    chosen = logits.argmax(dim=-1) if len(sampled) < len(inputs) else logits.new_empty(len(logits), dtype=torch.int64)
    chunk_size = rows_per_chunk(logits)
    for start in range(0, len(sampled), chunk_size):
        chunk = sampled[start : start + chunk_size]
        rows = torch.tensor(chunk, device=logits.device)
        chosen[rows] = _sample(logits.index_select(0, rows), [inputs[row] for row in chunk])
    return chosen


def _sample(logits: Tensor, inputs: Sequence[SamplingInputs]) -> Tensor:
    """Returns a random token for each row, [n] int64; overwrites `logits`."""
    parameters = [one.parameters for one in inputs]
    # Below the smallest normal float32 a temperature would round to 0. Subtracting the maximum prevents overflow.
    tiny = torch.finfo(torch.float32).tiny
    temperatures = torch.tensor([max(p.temperature, tiny) for p in parameters], device=logits.device)
    logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperatures[:, None])
    apply_filters(logits, parameters)
    return logits.add_(_gumbel(inputs, logits.shape[1], logits.device)).argmax(dim=-1)


def _gumbel(inputs: Sequence[SamplingInputs], vocab_size: int, device: torch.device) -> Tensor:
    """Returns standard Gumbel noise [n, vocab_size]: a pure function of seed, output position and token ID."""
    seeds = torch.tensor([_signed(one.parameters.seed or 0) for one in inputs], device=device)
    positions = torch.tensor([one.output_position for one in inputs], device=device)
    stream = _mix(seeds + _mix(positions + 1))
    tokens = torch.arange(1, vocab_size + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    bits = _mix(stream[:, None] + tokens[None, :]).bitwise_and_(0xFFFFFFFF)
    uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-32)
    # log1p keeps the exponential variate exact near 0, where the winners are. A value of 1 would give -inf, as if the
    # token were filtered out, so it is clamped to the largest float32 below 1.
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """Applies splitmix64's finalizer to int64 values, whose products wrap like those of uint64; overwrites `x`."""
    # In place throughout: on a CPU this is bound by memory bandwidth.
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_signed(0x94D049BB133111EB))
    return x.bitwise_xor_(_shift_right(x, 31))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Returns the logical right shift; int64's own shift replicates the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
