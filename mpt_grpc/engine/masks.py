"""Computes what constraints allow beside the model, so that a costly one holds up its own sequence alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from mpt_grpc.errors import InvalidRequestError
from mpt_grpc.step import SequenceStep, StepPlan

_NUM_WORKERS = 2
# What is almost ready is waited for: to compute a token again costs more.
_PATIENCE_S = 0.002


@dataclass(frozen=True)
class Masks:
    """What the workers have found, by sequence id."""

    bits: Mapping[int, bytes]
    """As of `Matcher.mask`."""
    errors: Mapping[int, Exception]

    def is_ready(self, sequence: SequenceStep) -> bool:
        """Whether the sequence's next token may be chosen now."""
        return not _has_matcher(sequence) or sequence.sequence_id in self.bits


class MaskWorkers:
    """Threads that compute masks. Belongs to the scheduler thread."""

    def __init__(self, on_ready: Callable[[], None]) -> None:
        """`on_ready` is called in a worker's thread for each mask."""
        self._on_ready = on_ready
        self._threads = ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="mask")
        self._pending: dict[int, Future[bytes]] = {}

    def start(self, plan: StepPlan) -> None:
        """Begins with the masks that the plan's choices need; one that is under way goes on."""
        for sequence in plan.sequences:
            matcher = None if sequence.sampling is None else sequence.sampling.matcher
            if matcher is not None and sequence.sequence_id not in self._pending:
                future = self._threads.submit(matcher.mask)
                future.add_done_callback(lambda _: self._on_ready())
                self._pending[sequence.sequence_id] = future

    def collect(self, plan: StepPlan) -> Masks:
        """Returns what is ready."""
        wanted = {s.sequence_id: self._pending[s.sequence_id] for s in plan.sequences if _has_matcher(s)}
        wait(wanted.values(), _PATIENCE_S)
        bits: dict[int, bytes] = {}
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
        """Drops what is under way for a sequence that has ended."""
        if (future := self._pending.pop(sequence_id, None)) is not None:
            future.cancel()

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _has_matcher(sequence: SequenceStep) -> bool:
    return sequence.sampling is not None and sequence.sampling.matcher is not None
