"""The requests in flight: where their events go, when they are overdue, and the account that each ends with."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from opentelemetry.context import Context
from opentelemetry.trace import Tracer

from mpt_grpc.engine.prepare import PreparedRequest
from mpt_grpc.engine.state import RequestState, SequenceState
from mpt_grpc.errors import DuplicateRequestError, OverloadedError
from mpt_grpc.request import FinishReason, GenerationRequest, RequestStats, TokenEvent
from mpt_grpc.schedule.scheduler import Progress
from mpt_grpc.schedule.sequence import Sequence as ScheduledSequence
from mpt_grpc.telemetry.tracing import record_phases

_RETRY_AFTER_S = 1.0
_NUM_ENDED = 64


@dataclass
class Flight:
    """One request in flight. Times are seconds since the epoch; only the scheduler thread changes it."""

    prepared: PreparedRequest
    receive: Callable[[TokenEvent], None]
    context: Context | None
    """The parent of its spans."""
    arrival_time_s: float
    sequences: Sequence[ScheduledSequence] = ()
    """Empty until the scheduler has it."""
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)
    """By index, of the sequences that have ended."""
    scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    num_output_tokens: int = 0

    @property
    def request(self) -> GenerationRequest:
        return self.prepared.request

    def stats(self, end_time_s: float) -> RequestStats:
        """The account so far."""
        return RequestStats(
            num_prompt_tokens=len(self.prepared.prompt_token_ids),
            num_cached_tokens=(self.sequences[0].num_cached_tokens or 0) if self.sequences else 0,
            num_preemptions=sum(sequence.num_preemptions for sequence in self.sequences),
            seed=self.request.sampling.seed or 0,
            arrival_time_s=self.arrival_time_s,
            scheduled_time_s=self.scheduled_time_s,
            first_token_time_s=self.first_token_time_s,
            end_time_s=end_time_s,
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
        return RequestState(self.request.request_id, stats, self.num_output_tokens, sequences)


class Flights:
    """All of them. `enter`, `get` and `len` are for any thread, the rest is the scheduler thread's."""

    def __init__(self, max_sequences: int, tracer: Tracer | None) -> None:
        """`max_sequences` may be in flight, those of all requests together."""
        self._max_sequences, self._tracer = max_sequences, tracer
        self._lock = threading.Lock()
        self._by_request_id: dict[str, Flight] = {}
        self._num_sequences = 0
        self._by_sequence_id: dict[int, Flight] = {}
        """Of the sequences that have not ended."""
        self._time_limited: dict[str, Flight] = {}
        self._outbox: list[tuple[Flight, TokenEvent]] = []
        self._ended: deque[RequestState] = deque(maxlen=_NUM_ENDED)

    def __len__(self) -> int:
        return len(self._by_request_id)

    def enter(self, flight: Flight) -> None:
        """Raises DuplicateRequestError or OverloadedError."""
        request = flight.request
        with self._lock:
            if request.request_id in self._by_request_id:
                raise DuplicateRequestError(f"request_id {request.request_id!r} is in flight already")
            if self._num_sequences + request.sampling.num_sequences > self._max_sequences:
                raise OverloadedError(f"{self._num_sequences} outputs are in flight, no more may wait", _RETRY_AFTER_S)
            self._by_request_id[request.request_id] = flight
            self._num_sequences += request.sampling.num_sequences

    def get(self, request_id: str) -> Flight | None:
        with self._lock:
            return self._by_request_id.get(request_id)

    def start(self, flight: Flight, sequences: Sequence[ScheduledSequence]) -> None:
        """The scheduler has it now."""
        flight.sequences = sequences
        self._by_sequence_id.update((sequence.sequence_id, flight) for sequence in sequences)
        if flight.request.stopping.time_limit_s is not None:
            self._time_limited[flight.request.request_id] = flight

    def of(self, sequence_id: int) -> Flight | None:
        """The flight of a sequence; None once the sequence has ended."""
        return self._by_sequence_id.get(sequence_id)

    def overdue(self, now_s: float) -> list[Flight]:
        """Those whose time is up."""
        return [
            flight
            for flight in self._time_limited.values()
            if now_s - flight.arrival_time_s >= (flight.request.stopping.time_limit_s or 0)
        ]

    def tell(self, step: Progress, now_s: float) -> None:
        """Tells the reader what a step did for a sequence; without effect once its request has ended."""
        sequence = step.sequence
        if (flight := self.of(sequence.sequence_id)) is None:
            return
        if step.token_id is not None:
            flight.num_output_tokens += 1
            flight.first_token_time_s = flight.first_token_time_s or now_s
        event = TokenEvent(
            flight.request.request_id,
            sequence.index,
            token_ids=() if step.token_id is None else (step.token_id,),
            logprobs=() if step.logprob is None else (step.logprob,),
            prompt_logprobs=step.prompt_logprobs,
            finish=step.finish,
        )
        if step.finish is not None:
            del self._by_sequence_id[sequence.sequence_id]
            flight.finish_reasons[sequence.index] = step.finish.reason
            if len(flight.finish_reasons) == len(flight.sequences):
                event = replace(event, stats=self._leave(flight, now_s))
        self._outbox.append((flight, event))

    def fail(self, flight: Flight, error: Exception, now_s: float) -> None:
        """Ends a request with an error, whatever its sequences have come to."""
        for sequence in flight.sequences:
            self._by_sequence_id.pop(sequence.sequence_id, None)
        stats = self._leave(flight, now_s)
        self._outbox.append((flight, TokenEvent(flight.request.request_id, error=error, stats=stats)))

    def fail_all(self, make_error: Callable[[], Exception]) -> None:
        """Ends all requests, those that the scheduler has not got yet too, without an account."""
        with self._lock:
            for request_id, flight in self._by_request_id.items():
                self._outbox.append((flight, TokenEvent(request_id, error=make_error())))
            self._by_request_id.clear()
            self._time_limited.clear()

    @property
    def ended(self) -> tuple[RequestState, ...]:
        """The last ones, by their end."""
        return tuple(self._ended)

    def in_flight(self, now_s: float) -> tuple[RequestState, ...]:
        """All of them, by arrival."""
        with self._lock:
            flights = list(self._by_request_id.values())
        return tuple(flight.state(flight.stats(now_s)) for flight in flights)

    def take_outbox(self) -> list[tuple[Flight, TokenEvent]]:
        """The events that were not delivered yet."""
        batch, self._outbox = self._outbox, []
        return batch

    def _leave(self, flight: Flight, now_s: float) -> RequestStats:
        stats = flight.stats(now_s)
        self._ended.append(flight.state(stats))
        if self._tracer is not None and flight.context is not None:
            record_phases(self._tracer, flight.context, stats, flight.num_output_tokens)
        self._time_limited.pop(flight.request.request_id, None)
        with self._lock:
            del self._by_request_id[flight.request.request_id]
            self._num_sequences -= len(flight.sequences)
        return stats
