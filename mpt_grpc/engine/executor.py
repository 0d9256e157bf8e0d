"""Executes the scheduler's plans: masks, model and sampler, and what to do when a step fails. Belongs to the scheduler
thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from mpt_grpc.engine.masks import MaskWorkers
from mpt_grpc.errors import DeviceLostError, InternalError
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.step import StepPlan, StepResult, merged

_log = logging.getLogger(__name__)


class StepExecutor:
    """Computes steps. A sequence whose mask is not ready gets no token and is tried again in the next step."""

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        *,
        on_mask_ready: Callable[[], None],
        on_out_of_memory: Callable[[], None],
    ) -> None:
        """`on_mask_ready` is called by any thread, `on_out_of_memory` when a step does not fit in memory."""
        self._runner, self._sampler = runner, sampler
        self._masks = MaskWorkers(on_ready=on_mask_ready)
        self._on_out_of_memory = on_out_of_memory

    def execute(self, plan: StepPlan) -> StepResult:
        """Computes a step. Sequences that fail, even alone, have an error in the result. Raises DeviceLostError."""
        try:
            return self._compute(plan)
        except DeviceLostError:
            raise
        except Exception as error:
            if len(plan.sequences) == 1:
                # Numbers that are not finite come from the weights: the way through the code says nothing about them.
                shown = None if isinstance(error, FloatingPointError) else error
                _log.error("request %r failed: %s", plan.sequences[0].request_id, error, exc_info=shown)
                fault = InternalError(f"the engine failed: {type(error).__name__}")
                fault.__cause__ = error
                return StepResult({}, errors={plan.sequences[0].sequence_id: fault})
            # Repeating a step is harmless, so its halves are tried, down to the sequences that fail alone.
            _log.warning("a step of %d sequences failed: its halves are tried", len(plan.sequences), exc_info=error)
            if isinstance(error, MemoryError):
                self._on_out_of_memory()
            middle = len(plan.sequences) // 2
            return merged([self.execute(StepPlan(half)) for half in (plan.sequences[:middle], plan.sequences[middle:])])

    def forget(self, sequence_id: int) -> None:
        """Drops the masks of a sequence that has ended."""
        self._masks.forget(sequence_id)

    def close(self) -> None:
        self._masks.close()

    def _compute(self, plan: StepPlan) -> StepResult:
        self._masks.start(plan)
        output = self._runner.run(plan)
        masks = self._masks.collect(plan)
        choosing = [sequence for sequence in plan.sequences if sequence.choices]
        ready = [sequence for sequence in choosing if masks.is_ready(sequence)]
        logits = output.logits
        if len(ready) < len(choosing):
            logits = logits[[masks.is_ready(sequence) for sequence in choosing for _ in sequence.choices]]
        result = self._sampler.sample(logits, ready, masks.bits, are_finite=output.are_finite)
        errors = {**result.errors, **masks.errors}
        return replace(result, prompt_logprobs=output.prompt_logprobs, errors=errors)
