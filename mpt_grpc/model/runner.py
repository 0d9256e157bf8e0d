"""Runs one step on the device: turns a StepPlan into tensors, runs the model and computes the requested logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from mpt_grpc.model.attention import AttentionBackend, AttentionMetadata, MetadataBuilder
from mpt_grpc.model.graphs import DecodeGraphs, Recorder
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.logprobs import token_logprobs
from mpt_grpc.model.mpt import MPT
from mpt_grpc.model.transfer import device_errors, fill_in, send
from mpt_grpc.request import SamplingParameters
from mpt_grpc.results import TokenLogprob
from mpt_grpc.step import SamplingInputs, SequenceStep, StepPlan

_SCORING_CHUNK_TOKENS = 64
"""How many prompt tokens are scored at once: their logits take 13 MB with a vocabulary of 50,000 tokens."""

_WARM_UP_TOKENS = (64, 192)
"""The lengths of chunks for which other kernels compute than for steps that decode, and each other's."""


@dataclass(frozen=True)
class StepOutput:
    """The model's output for one step."""

    logits: Tensor
    """Float32 [n, at least vocab_size], one row for each of the sequences' choices, in the plan's order."""
    prompt_logprobs: Mapping[int, tuple[TokenLogprob, ...]]
    """Prompt log probabilities by sequence ID, for the sequences with `scoring`."""
    are_finite: Tensor
    """Bool []: whether the activations of all tokens are finite; if not, the step has failed. The sampler reads it."""


class Runner:
    """Owns the model and its cache."""

    def __init__(
        self,
        model: MPT,
        cache: KVCache,
        attention: AttentionBackend,
        device: torch.device,
        vocab_size: int,
        recorder: Recorder | None = None,
    ) -> None:
        """`vocab_size` is that of the tokenizer: log probabilities are normalized over these tokens only.

        With a `recorder`, decoding steps are recorded; then `bind` of the attention must wait for nothing.
        """
        self._model, self._cache, self._attention, self._device = model, cache, attention, device
        self._vocab_size = vocab_size
        self._metadata = MetadataBuilder(cache.block_size, device)
        self._graphs = None
        if recorder is not None:
            self._graphs = DecodeGraphs(recorder, self._metadata, device)

    @device_errors()
    @torch.inference_mode()
    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
        """Computes one step. Idempotent: running a plan again writes the same values to the same cache positions.

        If tokens of the plan are pending, `chosen` has those that the step before has chosen, int64 [n] on the device.

        Raises DeviceLostError if the accelerator has failed permanently, MemoryError if the step does not fit in
        memory, FloatingPointError if a prompt token's log probability is not finite.
        """
        if self._graphs is not None and (results := self._graphs.run(plan, chosen)) is not None:
            logits, are_finite = results
            return StepOutput(logits, {}, are_finite)
        metadata = self._metadata.build(plan)
        if chosen is not None:
            fill_in(metadata.token_ids, chosen)
        hidden, logits, are_finite = self.compute(metadata)
        return StepOutput(logits, self._prompt_logprobs(plan, metadata, hidden), are_finite)

    @property
    def num_blocks(self) -> int:
        """The number of the cache's blocks."""
        return self._cache.num_blocks

    @torch.inference_mode()
    def warm_up(self, max_sequences: int, max_tokens: int) -> None:
        """Computes chunks and records decoding steps, so that no request waits for it. All blocks must be free.

        Steps are recorded for up to `max_sequences` sequences, of at most `max_tokens` tokens each.
        """
        size, inputs = self._cache.block_size, SamplingInputs(SamplingParameters(temperature=0, seed=0))
        for length in _WARM_UP_TOKENS:
            num_tokens = min(length, max_tokens, self._cache.num_blocks * size)
            blocks = tuple(range(-(-num_tokens // size)))
            # With the logits of all tokens, as for drafts.
            step = SequenceStep(-1, "warm-up", (0,) * num_tokens, 0, blocks, (inputs,) * num_tokens)
            self.run(StepPlan((step,)))
        if self._graphs is not None:
            self._graphs.record(lambda metadata: self.compute(metadata)[1:], max_sequences, max_tokens)

    def gives_equal_bits(self) -> bool:
        """Whether tokens have the same logits alone and beside others. The cache must have 16 blocks, all free."""
        size, inputs = self._cache.block_size, SamplingInputs(SamplingParameters(temperature=0, seed=0))
        long = SequenceStep(-2, "others", tuple(i % 64 for i in range(12 * size)), 0, tuple(range(4, 16)), (inputs,))
        blocks = tuple(range(4))
        for start, count in ((0, 3 * size), (3 * size, 1), (3 * size + 1, 5)):
            step = SequenceStep(-1, "one", tuple(i % 64 for i in range(count)), start, blocks, (inputs,))
            alone = self.run(StepPlan((step,))).logits.clone()
            if not torch.equal(alone, self.run(StepPlan((step, long))).logits[:1]):
                return False
        return True

    def compute(self, metadata: AttentionMetadata) -> tuple[Tensor, Tensor, Tensor]:
        """Queues a step's work on the device, without waiting for it.

        Returns the hidden states [num_tokens, d_model], the logits of the chosen tokens, and `are_finite`.
        """
        attend = self._attention.bind(self._cache, metadata)
        hidden = self._model(metadata.token_ids, metadata.positions, attend)
        # As many choices as tokens are one after each, as where all sequences decode.
        chosen = hidden if len(metadata.chosen) == len(hidden) else hidden[metadata.chosen]
        logits = self._model.logits(chosen) if len(chosen) else chosen.new_empty(0, self._vocab_size).float()
        return hidden, logits, hidden.isfinite().all()

    def _prompt_logprobs(
        self, plan: StepPlan, metadata: AttentionMetadata, hidden: Tensor
    ) -> dict[int, tuple[TokenLogprob, ...]]:
        scored = [
            (s.sequence_id, query_start + s.scoring.first, s.scoring)
            for s, query_start in zip(plan.sequences, metadata.query_starts, strict=False)
            if s.scoring is not None
        ]
        tokens = [
            (first + i, token_id, scoring.num_top_logprobs)
            for _, first, scoring in scored
            for i, token_id in enumerate(scoring.token_ids)
        ]
        logprobs: list[TokenLogprob] = []
        for start in range(0, len(tokens), _SCORING_CHUNK_TOKENS):
            indices, token_ids, num_top = zip(*tokens[start : start + _SCORING_CHUNK_TOKENS], strict=True)
            logprobs += token_logprobs(self._logits(hidden, indices)[:, : self._vocab_size], token_ids, num_top)
        if not all(math.isfinite(logprob.logprob) for logprob in logprobs):
            raise FloatingPointError("the model's logits are not finite")
        remaining = iter(logprobs)
        return {sequence_id: tuple(islice(remaining, len(scoring.token_ids))) for sequence_id, _, scoring in scored}

    def _logits(self, hidden: Tensor, indices: Sequence[int]) -> Tensor:
        return self._model.logits(hidden[send(torch.tensor(indices), self._device)])
