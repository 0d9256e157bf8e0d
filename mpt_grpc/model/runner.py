"""One step on the device: a StepPlan becomes tensors, the model runs, and the rows that are asked for become scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from mpt_grpc.errors import DeviceLostError
from mpt_grpc.model.attention import AttentionBackend, AttentionMetadata
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.logprobs import token_logprobs
from mpt_grpc.model.mpt import MPT
from mpt_grpc.request import TokenLogprob
from mpt_grpc.step import StepPlan

_SCORED_ROWS = 64
"""So many prompt tokens are scored at once: 13 MB for 50,000 tokens of vocabulary."""


@dataclass(frozen=True)
class StepOutput:
    """What the model has to say to a step."""

    logits: Tensor
    """Float32 [n, at least vocab_size], a row for each sequence that has a choice, in the plan's order."""
    prompt_logprobs: Mapping[int, tuple[TokenLogprob, ...]]
    """By sequence id, for those that have prompt tokens scored."""


class Runner:
    """Owns the model and its cache."""

    def __init__(
        self, model: MPT, cache: KVCache, attention: AttentionBackend, device: torch.device, vocab_size: int
    ) -> None:
        """`vocab_size` is the tokenizer's: log probabilities are over so many tokens."""
        self._model, self._cache, self._attention, self._device = model, cache, attention, device
        self._vocab_size = vocab_size

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepOutput:
        """Running the same plan again gives the same: the cache's slots are written with the same values.

        Raises DeviceLostError if the accelerator has failed for good, FloatingPointError if a token's state or a
        prompt token's log probability is not finite.
        """
        try:
            return self._run(plan)
        except torch.AcceleratorError as error:
            raise DeviceLostError(f"the accelerator has failed: {error}") from error

    def _run(self, plan: StepPlan) -> StepOutput:
        token_ids = torch.tensor([token for s in plan.sequences for token in s.token_ids], device=self._device)
        metadata = AttentionMetadata.from_plan(plan, self._cache.block_size, self._device)
        hidden = self._model(token_ids, metadata.positions, self._attention.bind(self._cache, metadata))
        if not hidden.isfinite().all():
            raise FloatingPointError("the model's activations are not finite")
        ends = [
            end - 1 for s, end in zip(plan.sequences, metadata.first_rows[1:], strict=True) if s.sampling is not None
        ]
        logits = self._logits(hidden, ends) if ends else hidden.new_empty((0, self._vocab_size), dtype=torch.float32)
        return StepOutput(logits, self._prompt_logprobs(plan, metadata, hidden))

    def _prompt_logprobs(
        self, plan: StepPlan, metadata: AttentionMetadata, hidden: Tensor
    ) -> dict[int, tuple[TokenLogprob, ...]]:
        scored = [
            (s.sequence_id, first_row + s.scoring.first, s.scoring)
            for s, first_row in zip(plan.sequences, metadata.first_rows, strict=False)
            if s.scoring is not None
        ]
        wanted = [
            (first_row + i, token, scoring.num_top_logprobs)
            for _, first_row, scoring in scored
            for i, token in enumerate(scoring.token_ids)
        ]
        logprobs: list[TokenLogprob] = []
        for start in range(0, len(wanted), _SCORED_ROWS):
            rows, tokens, num_top = zip(*wanted[start : start + _SCORED_ROWS], strict=True)
            logprobs += token_logprobs(self._logits(hidden, rows)[:, : self._vocab_size], tokens, num_top)
        if not all(math.isfinite(logprob.logprob) for logprob in logprobs):
            raise FloatingPointError("the model's scores are not finite")
        told = iter(logprobs)
        return {sequence_id: tuple(islice(told, len(scoring.token_ids))) for sequence_id, _, scoring in scored}

    def _logits(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        return self._model.logits(hidden[torch.tensor(rows, dtype=torch.int64, device=self._device)])
