"""The record of a request from its arrival to its end."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from opentelemetry.context import Context

from mpt_grpc.engine.prepare import PreparedRequest
from mpt_grpc.engine.state import RequestState, SequenceState
from mpt_grpc.engine.stream import AsyncStream, ThreadStream
from mpt_grpc.request import GenerationRequest
from mpt_grpc.results import FinishReason, RequestStats
from mpt_grpc.schedule.sequence import Sequence as ScheduledSequence


@dataclass
class RequestRecord:
    """One request in flight. Times are seconds since the epoch.

    It is preparing until it is in the scheduler as `sequences`. Only the scheduler thread changes it, and in `turn` the
    one that prepares it.
    """

    request: GenerationRequest
    stream: AsyncStream | ThreadStream
    context: Context | None
    """The parent context of the request's spans."""
    arrival_time_s: float
    timeout_s: float | None = None
    """How long the caller waits for the end."""
    turn: Future[None] = field(default_factory=Future)
    """The turn of the request to be prepared, which is cancelled when the request ends."""
    prepared: PreparedRequest | None = None
    sequences: Sequence[ScheduledSequence] = ()
    """Empty until the request is added to the scheduler."""
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)
    """The finish reasons of the sequences that have ended, by index."""
    scheduled_time_s: float | None = None
    first_token_time_s: float | None = None

    @property
    def deadline_s(self) -> float | None:
        """When the caller gives up; None if it waits, or if the request's time limit ends it before."""
        if self.timeout_s is None or 0 < (self.request.stopping.time_limit_s or 0) <= self.timeout_s:
            return None
        return self.arrival_time_s + self.timeout_s

    def stats(self, end_time_s: float) -> RequestStats:
        """Returns the request's statistics, as of `end_time_s`."""
        request = self.request if self.prepared is None else self.prepared.request
        return RequestStats(
            num_prompt_tokens=0 if self.prepared is None else len(self.prepared.prompt_token_ids),
            num_cached_tokens=(self.sequences[0].num_cached_tokens or 0) if self.sequences else 0,
            num_preemptions=sum(sequence.num_preemptions for sequence in self.sequences),
            seed=request.sampling.seed or 0,
            arrival_time_s=self.arrival_time_s,
            scheduled_time_s=self.scheduled_time_s,
            first_token_time_s=self.first_token_time_s,
            end_time_s=end_time_s,
            num_output_tokens=sum(
                sequence.num_output_tokens - len(request.outputs[sequence.index]) for sequence in self.sequences
            ),
        )

    def state(self, stats: RequestStats) -> RequestState:
        sequences = tuple(
            SequenceState(
                sequence.index,
                sequence.num_computed,
                sequence.num_output_tokens,
                sequence.block_table,
                self.finish_reasons.get(sequence.index),
            )
            for sequence in self.sequences
        )
        return RequestState(self.request.request_id, stats, sequences)
