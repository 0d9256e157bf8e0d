"""Samples a token ID from each row of logits, vectorized over the batch.

The logits are processed in this order:

1. repetition penalty over prompt and output; frequency penalty, then presence penalty, over the output
2. logit bias
3. removal of all tokens but the allowed ones, and of those that the constraint's mask excludes
4. removal of the forbidden tokens (end-of-sequence and stop tokens before `min_new_tokens`), unless no other is left
5. at temperature 0 the highest logit wins, the lowest ID among equals; otherwise, division by the temperature
6. top-k, top-p, min-p and typical-p filtering
7. random sampling

Steps 1 to 4 and the filters are implemented in `logits.py`, and steps 5 to 7 of random choices in `draws.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import is_
from types import MappingProxyType

import torch
from torch import Tensor

from mpt_grpc.errors import InternalError
from mpt_grpc.model.draws import draws
from mpt_grpc.model.logits import adjust, argmax, is_adjusted
from mpt_grpc.model.logprobs import token_logprobs
from mpt_grpc.model.native import Kernels
from mpt_grpc.model.transfer import Receipt, device_errors, send
from mpt_grpc.results import TokenLogprob
from mpt_grpc.step import SamplingInputs, SequenceStep, StepResult

_NO_MASKS: Mapping[int, Sequence[bytes]] = MappingProxyType({})


class Sampler:
    """Chooses the next tokens of each sequence of a step that is to get one, and so decides which drafts are right."""

    def __init__(self, vocab_size: int, kernels: Kernels | None = None) -> None:
        """`vocab_size` is that of the tokenizer: token IDs beyond it are padding of the embedding and never chosen.

        kernels: the compiled kernels, where the logits are on a CPU.
        """
        self._vocab_size, self._kernels = vocab_size, kernels
        self._last: _Batch | None = None
        """What the inputs of the last step imply; those of the next are mostly the same objects."""

    def sample(
        self,
        logits: Tensor,
        sequences: Sequence[SequenceStep],
        masks: Mapping[int, Sequence[bytes]] = _NO_MASKS,
        *,
        are_finite: Tensor | None = None,
    ) -> StepResult:
        """Chooses tokens and waits for them. The arguments and errors are those of `choose` and `Chosen.result`."""
        return self.choose(logits, sequences, masks, are_finite=are_finite).result()

    @device_errors()
    @torch.inference_mode()
    def choose(
        self,
        logits: Tensor,
        sequences: Sequence[SequenceStep],
        masks: Mapping[int, Sequence[bytes]] = _NO_MASKS,
        *,
        are_finite: Tensor | None = None,
    ) -> Chosen:
        """Samples from the rows of `logits` [n, at least vocab_size], float32; `logits` is not modified.

        On an accelerator, this only queues the work. Log probabilities, if requested, are computed when the result is
        read, from the same `logits`.

        The rows belong to the sequences' choices, in order. `masks` maps sequence IDs to constraint masks for the first
        choices: token i is allowed if bit i % 8 of byte i // 8 is set. `are_finite` is that of the step's `StepOutput`.

        Raises DeviceLostError, and MemoryError if something does not fit in memory.
        """
        logits = logits[:, : self._vocab_size]
        batch = self._batch(tuple([inputs for sequence in sequences for inputs in sequence.choices]), logits)
        row_masks = _by_row(sequences, masks) if masks else {}
        processed = adjust(logits, batch.inputs, row_masks) if batch.is_adjusted or row_masks else logits
        chosen, is_finite = self._highest(processed, logits, batch)
        if batch.draws:
            positions = [s.output_position + choice for s in sequences for choice in range(len(s.choices))]
        for part in batch.draws:
            chosen[part.indices] = part.tokens(processed, [positions[row] for row in part.rows])
        is_allowed = is_finite  # -inf is not finite
        if processed is not logits:
            is_allowed = processed.gather(1, chosen[:, None])[:, 0] > -torch.inf
        # The only transfer to the host, unless log probabilities are requested.
        results = [chosen, is_finite, is_allowed, *(() if are_finite is None else (are_finite[None],))]
        receipt = Receipt(torch.cat(results))
        return Chosen(chosen, sequences, masks, batch, receipt, logits if batch.num_top else None)

    def _highest(self, logits: Tensor, raw: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Returns the highest token of each row, int64 [n], and whether its `raw` logits are finite, bool [n].

        The tokens are undefined if all rows are drawn.
        """
        if self._kernels is not None:
            tokens, is_finite = self._kernels.argmax(raw)
            if logits is not raw and batch.has_greedy_rows:
                tokens, _ = self._kernels.argmax(logits)
            return tokens, is_finite
        is_finite = raw.amax(dim=-1).isfinite() & raw.amin(dim=-1).isfinite()  # both propagate NaN
        return argmax(logits) if batch.has_greedy_rows else raw.new_empty(len(raw), dtype=torch.int64), is_finite

    def _batch(self, inputs: tuple[SamplingInputs, ...], logits: Tensor) -> _Batch:
        last = self._last
        if last is None or len(inputs) != len(last.inputs) or not all(map(is_, inputs, last.inputs)):
            last = self._last = _Batch(inputs, logits, self._kernels)
        return last


@dataclass(frozen=True)
class Chosen:
    """The tokens that were chosen in a step; on an accelerator, on their way to the host."""

    token_ids: Tensor
    """On the device, int64 [n]: the token of each choice."""
    _sequences: Sequence[SequenceStep]
    _masks: Mapping[int, Sequence[bytes]]
    _batch: _Batch
    _receipt: Receipt
    _logits: Tensor | None

    @device_errors()
    @torch.inference_mode()
    def result(self) -> StepResult:
        """Returns the result of the step, for which it waits.

        A sequence gets the tokens of its choices up to the first that differs from the draft. If the first row of a
        sequence is not finite or its mask allows no token, there is an InternalError for that sequence only. Raises
        FloatingPointError if the step's activations are not finite, and the errors of `Sampler.choose`.
        """
        sequences, masks = self._sequences, self._masks
        num, values = len(self.token_ids), self._receipt.read()
        token_ids, finite, allowed = values[:num], values[num : 2 * num], values[2 * num : 3 * num]
        if not all(values[3 * num :]):
            raise FloatingPointError("the model's activations are not finite")
        chosen_ids: dict[int, tuple[int, ...]] = {}
        rows: dict[int, range] = {}
        errors: dict[int, Exception] = {}
        first = 0
        for sequence in sequences:
            sequence_id, last = sequence.sequence_id, first
            if len(sequence.choices) > 1:
                num_masked = len(masks[sequence_id]) if sequence_id in masks else len(sequence.choices)
                for draft, _ in zip(sequence.drafts, range(1, num_masked), strict=False):
                    if token_ids[last] != draft or not (finite[last + 1] and allowed[last + 1]):
                        break
                    last += 1
            if finite[first] and allowed[first]:
                chosen_ids[sequence_id] = tuple(token_ids[first : last + 1])
                if self._batch.num_top:
                    rows[sequence_id] = range(first, last + 1)
            else:
                why = "the constraint allows no token" if finite[first] else "the model's logits are not finite"
                errors[sequence_id] = InternalError(why)
            first += len(sequence.choices)
        logprobs = {} if self._logits is None else _logprobs(self._logits, self._batch, rows, token_ids)
        return StepResult(chosen_ids, logprobs, errors=errors)


class _Batch:
    """What the sampling inputs of a batch imply, of which `logits` is an example."""

    def __init__(self, inputs: tuple[SamplingInputs, ...], logits: Tensor, kernels: Kernels | None) -> None:
        self.inputs = inputs
        self.is_adjusted = any(map(is_adjusted, inputs))
        self.num_top = {row: one.num_top_logprobs for row, one in enumerate(inputs) if one.num_top_logprobs is not None}
        """The numbers of most likely tokens wanted, by row, for the rows whose log probabilities are."""
        self.has_greedy_rows = any(one.parameters.temperature == 0 for one in inputs)
        self.draws = draws([one.parameters for one in inputs], logits, kernels)


def _by_row(sequences: Sequence[SequenceStep], masks: Mapping[int, Sequence[bytes]]) -> dict[int, bytes]:
    """Returns the masks of the sequences' choices by row."""
    by_row: dict[int, bytes] = {}
    first = 0
    for sequence in sequences:
        rows = range(first, first + len(sequence.choices))
        by_row.update(zip(rows, masks.get(sequence.sequence_id, ()), strict=False))
        first = rows.stop
    return by_row


def _logprobs(
    logits: Tensor, batch: _Batch, rows: Mapping[int, range], token_ids: Sequence[int]
) -> dict[int, tuple[TokenLogprob, ...]]:
    """Returns the log probabilities of the chosen tokens, by sequence ID, for the sequences that requested them."""
    wanted = {sequence_id: part for sequence_id, part in rows.items() if part.start in batch.num_top}
    flat = [row for part in wanted.values() for row in part]
    selected = logits.index_select(0, send(torch.tensor(flat, dtype=torch.int64), logits.device))
    num_top = [batch.num_top[row] for row in flat]
    logprobs = iter(token_logprobs(selected, [token_ids[row] for row in flat], num_top))
    return {sequence_id: tuple(islice(logprobs, len(part))) for sequence_id, part in wanted.items()}
