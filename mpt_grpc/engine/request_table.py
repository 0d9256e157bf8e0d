"""Tracks the requests from their arrival to their end: their places, token events, time limits and statistics."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context

from mpt_grpc.engine.outbox import Delivery
from mpt_grpc.engine.overload import max_new_tokens, queue_full, too_late_at_arrival, too_late_in_queue
from mpt_grpc.engine.request_record import RequestRecord
from mpt_grpc.engine.service_times import ServiceTimes
from mpt_grpc.engine.state import EngineLoad, RequestState
from mpt_grpc.errors import DuplicateRequestError, OverloadedError, UnavailableError
from mpt_grpc.reports import Observer, RequestReport, StepReport
from mpt_grpc.results import Finish, FinishReason, RequestStats, TokenEvent
from mpt_grpc.schedule.sequence import Sequence as ScheduledSequence
from mpt_grpc.step import StepPlan

_NUM_ENDED = 64


class RequestTable:
    """All requests in flight.

    Any thread may call `add`, `get`, `is_preparing`, `remove_preparing` and `len`, and read `has_scheduled`; the rest
    belongs to the scheduler thread.
    """

    def __init__(self, max_sequences: int) -> None:
        """`max_sequences` limits the sequences in flight, counted over all requests."""
        self._max_sequences = max_sequences
        self.observer: Observer | None = None
        """Receives the reports of steps and requests."""
        self._lock = threading.Lock()
        self._by_request_id: dict[str, RequestRecord] = {}
        self._num_sequences = 0
        self._by_sequence_id: dict[int, RequestRecord] = {}
        """Contains only sequences that have not ended."""
        self.num_preparing = 0
        """The number of requests that are not yet in the scheduler."""
        self._time_limited: dict[str, RequestRecord] = {}
        self._tokens: list[Delivery] = []
        self._ends: list[Delivery] = []
        """What is yet to be delivered, as the outbox takes it."""
        self._ended: deque[RequestState] = deque(maxlen=_NUM_ENDED)
        self._times = ServiceTimes()

    def __len__(self) -> int:
        return len(self._by_request_id)

    def add(self, record: RequestRecord, load: EngineLoad) -> None:
        """Adds a request. Raises DuplicateRequestError or OverloadedError."""
        request = record.request
        with self._lock:
            if request.request_id in self._by_request_id:
                raise DuplicateRequestError(f"request_id {request.request_id!r} is already in progress: use another ID")
            if self._num_sequences + request.sampling.num_sequences > self._max_sequences:
                raise queue_full(self._num_sequences, self._times, load)
            if load.num_waiting:
                others = (other.request for other in self._by_request_id.values())
                if (refusal := too_late_at_arrival(record, others, self._times, load)) is not None:
                    raise refusal
            self._by_request_id[request.request_id] = record
            self._num_sequences += request.sampling.num_sequences
            self.num_preparing += 1
            if (request.stopping.time_limit_s or 0) > 0:
                self._time_limited[request.request_id] = record

    def late(self, now_s: float) -> list[tuple[RequestRecord, OverloadedError]]:
        """Returns the requests in the queue that would end too late even if they started now, with an error for each.

        The newest is none of them: nothing waits for its place, and how long requests run must be measured.
        """
        with self._lock:
            waiting = [one for one in self._by_request_id.values() if one.sequences and one.scheduled_time_s is None]
            run_time = self._times.run_time()
        refusals = ((record, too_late_in_queue(record, run_time, now_s)) for record in waiting[:-1])
        return [(record, refusal) for record, refusal in refusals if refusal is not None]

    def get(self, request_id: str) -> RequestRecord | None:
        with self._lock:
            return self._by_request_id.get(request_id)

    def remove_preparing(self, record: RequestRecord) -> bool:
        """Removes a request that is preparing; returns False if it is in the scheduler by now, or has ended."""
        with self._lock:
            if record.sequences or self._by_request_id.get(record.request.request_id) is not record:
                return False
            self._forget(record)
            return True

    def is_preparing(self, record: RequestRecord) -> bool:
        """Whether the request is in flight, but not yet in the scheduler."""
        return not record.sequences and self.get(record.request.request_id) is record

    def schedule(self, record: RequestRecord, sequences: Sequence[ScheduledSequence]) -> None:
        """Records that the request was added to the scheduler, as these sequences."""
        with self._lock:
            record.sequences = sequences
            self.num_preparing -= 1
        self._by_sequence_id.update((sequence.sequence_id, record) for sequence in sequences)

    @property
    def has_scheduled(self) -> bool:
        """Whether a request is in the scheduler."""
        return bool(self._by_sequence_id)

    def by_sequence(self, sequence_id: int) -> RequestRecord | None:
        """Returns the request that a sequence belongs to, or None once the sequence has ended."""
        return self._by_sequence_id.get(sequence_id)

    def overdue(self, now_s: float) -> list[RequestRecord]:
        """Returns the requests that have exceeded their time limit."""
        with self._lock:
            return [record for record in self._time_limited.values() if _end_time_s(record) <= now_s]

    @property
    def next_end_time_s(self) -> float | None:
        """When the next request exceeds its time limit, or None if no request has one."""
        with self._lock:
            return min(map(_end_time_s, self._time_limited.values()), default=None)

    def report(self, sequence: ScheduledSequence, event: TokenEvent, now_s: float) -> None:
        """Queues what a step did for a sequence; ignored once the sequence has ended."""
        record = self._by_sequence_id.get(sequence.sequence_id)
        if record is None:
            return
        if record.first_token_time_s is None and event.token_id is not None:
            record.first_token_time_s = now_s
        if event.finish is not None:
            del self._by_sequence_id[sequence.sequence_id]
            record.finish_reasons[sequence.index] = event.finish.reason
            if len(record.finish_reasons) == len(record.sequences):
                event = event._replace(stats=self._remove(record, now_s))
        # All but the last event of a request are tokens to the outbox, so that they stay in order.
        deliveries = self._tokens if event.stats is None else self._ends
        deliveries.append((record.stream.receive, event))

    def measure_step(self, num_new_tokens: Mapping[int, int], duration_s: float) -> None:
        """Measures a step that was computed at once."""
        if num_new_tokens:
            with self._lock:
                self._times.record_step(duration_s, sum(num_new_tokens.values()) / len(num_new_tokens))

    def report_step(
        self, plan: StepPlan, num_new_tokens: Mapping[int, int], start_time_s: float, duration_s: float, number: int
    ) -> None:
        """Queues the report of a step, before those of the requests that end with it."""
        if (observer := self.observer) is None:
            return
        contexts: tuple[Context, ...] = ()
        if observer.trace_interval is not None and number % observer.trace_interval == 0:
            found = (self.by_sequence(step.sequence_id) for step in plan.sequences)
            records = {id(record): record for record in found if record is not None}
            contexts = tuple(record.context for record in records.values() if record.context is not None)
        request_ids = {*plan.preempted, *plan.resumed, *(step.request_id for step in plan.sequences)}
        # A request that is being prepared is another one, with the ID of one that has ended.
        left = ((request_id, self._by_request_id.get(request_id)) for request_id in request_ids)
        ended = frozenset(request_id for request_id, record in left if record is None or not record.sequences)
        report = StepReport(plan, num_new_tokens, start_time_s, duration_s, ended, contexts)
        self._ends.append((observer.observe_step, report))

    def report_unprepared(self, record: RequestRecord, finish: Finish, now_s: float) -> None:
        """Queues the end of a request that was removed while it was preparing: it has no output."""
        stats, last = record.stats(now_s), max(record.request.outputs)
        record.finish_reasons = dict.fromkeys(record.request.outputs, finish.reason)
        self._report_end(record, stats)
        for index in record.request.outputs:
            event = TokenEvent(index, finish=finish, stats=stats if index == last else None)
            self._ends.append((record.stream.receive, event))

    def fail(self, record: RequestRecord, error: Exception, now_s: float) -> None:
        """Ends a request with an error, whatever the state of its sequences."""
        for sequence in record.sequences:
            self._by_sequence_id.pop(sequence.sequence_id, None)
        stats = self._remove(record, now_s, error)
        self._ends.append((record.stream.receive, TokenEvent(0, error=error, stats=stats)))

    def fail_all(self, why: UnavailableError, now_s: float) -> None:
        """Ends all requests, including those not yet in the scheduler."""
        with self._lock:
            for record in self._by_request_id.values():
                error, stats = why.again(), record.stats(now_s)
                self._report_end(record, stats, error)
                self._ends.append((record.stream.receive, TokenEvent(0, error=error, stats=stats)))
            self._by_request_id.clear()
            self._time_limited.clear()

    @property
    def ended(self) -> tuple[RequestState, ...]:
        """The most recently ended requests, in the order in which they ended."""
        return tuple(self._ended)

    def in_flight(self, now_s: float) -> tuple[RequestState, ...]:
        """Returns the states of all requests in flight, in order of arrival."""
        with self._lock:
            records = list(self._by_request_id.values())
        return tuple(record.state(record.stats(now_s)) for record in records)

    def take_undelivered(self) -> tuple[list[Delivery], list[Delivery]]:
        """Removes and returns the tokens and the ends that are yet to be delivered, as `Outbox.put` takes them."""
        taken = self._tokens, self._ends
        self._tokens, self._ends = [], []
        return taken

    def _remove(self, record: RequestRecord, now_s: float, error: Exception | None = None) -> RequestStats:
        """Removes an ended request and returns its statistics."""
        stats = record.stats(now_s)
        self._ended.append(record.state(stats))
        self._report_end(record, stats, error)
        with self._lock:
            self._forget(record)
            if record.prepared is not None:
                was_cancelled = FinishReason.CANCELLED in record.finish_reasons.values()
                most = max_new_tokens(record.prepared.request) or 0
                self._times.record(stats, len(record.sequences), most, was_cancelled=was_cancelled)
        return stats

    def _report_end(self, record: RequestRecord, stats: RequestStats, error: Exception | None = None) -> None:
        if (observer := self.observer) is not None:
            reasons = tuple(reason for _, reason in sorted(record.finish_reasons.items()))
            report = RequestReport(record.request, stats, reasons, error, record.context)
            self._ends.append((observer.observe_request, report))

    def _forget(self, record: RequestRecord) -> None:
        """Gives the request's place up. The lock must be held."""
        del self._by_request_id[record.request.request_id]
        self._time_limited.pop(record.request.request_id, None)
        self._num_sequences -= record.request.sampling.num_sequences
        self.num_preparing -= not record.sequences
        record.turn.cancel()


def _end_time_s(record: RequestRecord) -> float:
    return record.arrival_time_s + (record.request.stopping.time_limit_s or 0)
