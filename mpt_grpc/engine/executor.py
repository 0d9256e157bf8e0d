"""Executes the scheduler's plans: masks, model and sampler, and what to do when a step fails. Belongs to the scheduler
thread."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mpt_grpc.engine.masks import MaskWorkers
from mpt_grpc.errors import DeviceLostError, InternalError
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Chosen, Sampler
from mpt_grpc.results import TokenLogprob
from mpt_grpc.step import StepPlan, StepResult, merged

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LaunchedStep:
    """A step that a CPU has computed, and an accelerator has in its queue."""

    plan: StepPlan
    start_s: float
    """When it was launched, by the monotonic clock."""
    chosen: Chosen | Exception
    """The error if it could not be launched."""
    prompt_logprobs: Mapping[int, tuple[TokenLogprob, ...]]
    errors: Mapping[int, Exception]

    @property
    def token_ids(self) -> Tensor | None:
        """The chosen tokens on the device, int64 [n]; None if no token was chosen."""
        return self.chosen.token_ids if isinstance(self.chosen, Chosen) and len(self.chosen.token_ids) else None

    @property
    def may_be_followed(self) -> bool:
        """Whether the next step may be launched before the result of this one is known."""
        return not (isinstance(self.chosen, Exception) or self.plan.needs_host)

    def result(self) -> StepResult:
        """Returns the result, for which it waits. Raises an error if the step has failed."""
        if isinstance(self.chosen, Exception):
            raise self.chosen
        result = self.chosen.result()
        if not (self.prompt_logprobs or self.errors):
            return result
        return replace(result, prompt_logprobs=self.prompt_logprobs, errors={**result.errors, **self.errors})


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

    def launch(self, plan: StepPlan, previous: LaunchedStep | None = None) -> LaunchedStep:
        """Starts a step. If its plan has pending tokens, `previous` is the step that chooses them.

        Raises DeviceLostError; other errors are those of the result.
        """
        start_s = time.monotonic()
        try:
            return self._launch(plan, start_s, previous)
        except DeviceLostError:
            raise
        except Exception as error:
            return LaunchedStep(plan, start_s, error, {}, {})

    def repeat(self, failed: StepPlan, remaining: StepPlan, error: Exception) -> StepResult:
        """Computes what remains of a step that has failed with `error`.

        Sequences that fail, even alone, have an error in the result. Raises DeviceLostError.
        """
        _free_tensors(error)
        if len(failed.sequences) == 1:
            # Numbers that are not finite come from the weights: the way through the code says nothing about them.
            shown = None if isinstance(error, FloatingPointError) else error
            _log.error("request %r failed: %s", failed.sequences[0].request_id, error, exc_info=shown)
            fault = InternalError(f"the engine failed: {type(error).__name__}")
            fault.__cause__ = error
            return StepResult({}, errors={failed.sequences[0].sequence_id: fault})
        # Repeating a step is harmless, so its halves are tried, down to the sequences that fail alone.
        _log.warning("a step of %d sequences failed: its halves are tried", len(failed.sequences), exc_info=error)
        if isinstance(error, MemoryError):
            self._on_out_of_memory()
        middle = len(remaining.sequences) // 2
        halves = (remaining.sequences[:middle], remaining.sequences[middle:])
        return merged([self._execute(StepPlan(half)) for half in halves if half])

    def forget(self, sequence_id: int) -> None:
        """Drops the masks of a sequence that has ended."""
        self._masks.forget(sequence_id)

    def close(self) -> None:
        """Frees the model and its cache, whoever still holds the engine. No step may be launched from now on."""
        self._masks.close()
        del self._runner, self._sampler

    def _execute(self, plan: StepPlan) -> StepResult:
        try:
            return self.launch(plan).result()
        except DeviceLostError:
            raise
        except Exception as error:
            return self.repeat(plan, plan, error)

    def _launch(self, plan: StepPlan, start_s: float, previous: LaunchedStep | None) -> LaunchedStep:
        constrained = self._masks.start(plan)
        output = self._runner.run(plan, None if previous is None else previous.token_ids)
        masks = self._masks.collect(constrained)
        choosing, logits = [sequence for sequence in plan.sequences if sequence.choices], output.logits
        if missing := masks.missing:
            logits = logits[[sequence.sequence_id not in missing for sequence in choosing for _ in sequence.choices]]
            choosing = [sequence for sequence in choosing if sequence.sequence_id not in missing]
        chosen = self._sampler.choose(logits, choosing, masks.bits, are_finite=output.are_finite)
        return LaunchedStep(plan, start_s, chosen, output.prompt_logprobs, masks.errors)


def _free_tensors(error: BaseException | None) -> None:
    """Frees what the frames of a failed step hold, such as tensors that leave no memory for another try."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
