"""Computes token masks of constraints while the model runs, so that a costly one delays only its own sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

from mpt_grpc.errors import InvalidRequestError
from mpt_grpc.step import SequenceStep, StepPlan
from mpt_grpc.worker_threads import WorkerThreads

_NUM_WORKERS = 2
# Waiting briefly for masks that are almost ready is cheaper than computing the sequence's last token again.
_MAX_WAIT_S = 0.002


@dataclass(frozen=True)
class Masks:
    """The finished masks, and the errors of failed ones, by sequence ID."""

    bits: Mapping[int, Sequence[bytes]]
    """The tokens that may come next, in the format of `Matcher.masks`."""
    errors: Mapping[int, Exception]

    def is_ready(self, sequence: SequenceStep) -> bool:
        """Whether the sequence's next token may be chosen now."""
        return not _has_matcher(sequence) or sequence.sequence_id in self.bits


class MaskWorkers:
    """A pool of threads that compute masks. To be used by the scheduler thread only."""

    def __init__(self, on_ready: Callable[[], None]) -> None:
        """`on_ready` is called in a worker thread whenever a mask is done."""
        self._on_ready = on_ready
        self._threads = WorkerThreads(_NUM_WORKERS, "mask")
        self._pending: dict[int, Future[list[bytes]]] = {}

    def start(self, plan: StepPlan) -> None:
        """Starts computing the masks that the plan's sequences need, unless they are already being computed."""
        for sequence in plan.sequences:
            matcher = sequence.choices[0].matcher if sequence.choices else None
            if matcher is not None and sequence.sequence_id not in self._pending:
                future = self._threads.submit(partial(matcher.masks, sequence.drafts))
                future.add_done_callback(lambda _: self._on_ready())
                self._pending[sequence.sequence_id] = future

    def collect(self, plan: StepPlan) -> Masks:
        """Returns the plan's masks that are ready, after waiting briefly for those that are not."""
        wanted = {s.sequence_id: self._pending[s.sequence_id] for s in plan.sequences if _has_matcher(s)}
        wait(wanted.values(), _MAX_WAIT_S)
        bits: dict[int, Sequence[bytes]] = {}
        errors: dict[int, Exception] = {}
        for sequence_id, future in wanted.items():
            if future.done():
                del self._pending[sequence_id]
                try:
                    bits[sequence_id] = future.result()
                except InvalidRequestError as error:
                    errors[sequence_id] = error
        return Masks(bits, errors)

    def forget(self, sequence_id: int) -> None:
        """Discards the pending mask of a sequence that has ended."""
        if (future := self._pending.pop(sequence_id, None)) is not None:
            future.cancel()

    def close(self) -> None:
        """Shuts down the threads without waiting for them."""
        self._threads.close()


def _has_matcher(sequence: SequenceStep) -> bool:
    return bool(sequence.choices) and sequence.choices[0].matcher is not None
