"""Computes token masks of constraints while the model runs, so that a costly one delays only its own sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

from mpt_grpc.errors import InvalidRequestError
from mpt_grpc.step import StepPlan
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
    missing: Set[int]
    """The sequences whose next token cannot be chosen now."""


_NO_MASKS = Masks({}, {}, frozenset())


class MaskWorkers:
    """A pool of threads that compute masks. To be used by the scheduler thread only."""

    def __init__(self, on_ready: Callable[[], None]) -> None:
        """`on_ready` is called in a worker thread whenever a mask is done."""
        self._on_ready = on_ready
        self._threads = WorkerThreads(_NUM_WORKERS, "mask")
        self._pending: dict[int, Future[list[bytes]]] = {}

    def start(self, plan: StepPlan) -> list[int]:
        """Starts computing the masks that a plan's sequences need, unless they are already being computed.

        Returns the IDs of these sequences.
        """
        constrained = []
        for sequence in plan.sequences:
            if not sequence.choices or (matcher := sequence.choices[0].matcher) is None:
                continue
            constrained.append(sequence.sequence_id)
            if sequence.sequence_id not in self._pending:
                future = self._threads.submit(partial(matcher.masks, sequence.drafts))
                future.add_done_callback(lambda _: self._on_ready())
                self._pending[sequence.sequence_id] = future
        return constrained

    def collect(self, sequence_ids: Sequence[int]) -> Masks:
        """Returns the masks of these sequences that are ready, after waiting briefly for those that are not."""
        if not sequence_ids:
            return _NO_MASKS
        wanted = {sequence_id: self._pending[sequence_id] for sequence_id in sequence_ids}
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
        return Masks(bits, errors, wanted.keys() - bits.keys())

    def forget(self, sequence_id: int) -> None:
        """Discards the pending mask of a sequence that has ended."""
        if (future := self._pending.pop(sequence_id, None)) is not None:
            future.cancel()

    def close(self) -> None:
        """Shuts down the threads without waiting for them."""
        self._threads.close()
