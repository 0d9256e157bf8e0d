"""One step on the device: a StepPlan becomes tensors, the model runs, and the rows that sample become scores."""

from __future__ import annotations

import torch
from torch import Tensor

from mpt_grpc.errors import DeviceLostError
from mpt_grpc.model.attention import AttentionBackend, AttentionMetadata
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.mpt import MPT
from mpt_grpc.step import StepPlan


class Runner:
    """Owns the model and its cache."""

    def __init__(self, model: MPT, cache: KVCache, attention: AttentionBackend, device: torch.device) -> None:
        self._model, self._cache, self._attention, self._device = model, cache, attention, device

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor:
        """Returns float32 scores [n, vocab_size], a row for each sequence of `plan` that samples, in its order.

        Running the same plan again gives the same: the cache's slots are written with the same values. Raises
        DeviceLostError if the accelerator has failed for good, FloatingPointError if a token's state is not finite.
        """
        try:
            return self._run(plan)
        except torch.AcceleratorError as error:
            raise DeviceLostError(f"the accelerator has failed: {error}") from error

    def _run(self, plan: StepPlan) -> Tensor:
        token_ids = torch.tensor([token for s in plan.sequences for token in s.token_ids], device=self._device)
        metadata = AttentionMetadata.from_plan(plan, self._cache.block_size, self._device)
        hidden = self._model(token_ids, metadata.positions, self._attention.bind(self._cache, metadata))
        if not hidden.isfinite().all():
            raise FloatingPointError("the model's activations are not finite")
        ends = [end - 1 for s, end in zip(plan.sequences, metadata.first_rows[1:], strict=True) if s.samples]
        return self._model.logits(hidden[torch.tensor(ends, dtype=torch.int64, device=self._device)])
