"""The scheduler thread, which alone accesses the model, the cache and the sequences: it plans a step, has it executed,
and reports what it did.

Other threads send it commands through a queue: to add a request, to end one or one of its outputs, and to stop. It
sends back token events through an outbox. docs/architecture.md shows the whole way of a request.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

from opentelemetry.context import Context

from mpt_grpc.engine.assembly import RequestAssembly
from mpt_grpc.engine.executor import StepExecutor
from mpt_grpc.engine.outbox import Outbox
from mpt_grpc.engine.outputs import request_assembly
from mpt_grpc.engine.prepare import Preparation, PreparedRequest, Preparers
from mpt_grpc.engine.request_table import RequestRecord, RequestTable
from mpt_grpc.engine.state import EngineLoad, EngineState
from mpt_grpc.engine.stream import AsyncStream, ThreadStream, collect
from mpt_grpc.engine.validation import num_sequences_violations
from mpt_grpc.errors import (
    DrainingError,
    EngineStoppedError,
    InternalError,
    InvalidRequestError,
    MptServerError,
    OverloadedError,
    UnavailableError,
)
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.reports import Observer
from mpt_grpc.request import (
    Finish,
    FinishReason,
    Generation,
    GenerationRequest,
    OutputDelta,
    TokenEvent,
)
from mpt_grpc.schedule.scheduler import Scheduler
from mpt_grpc.schedule.sequence import Sequence
from mpt_grpc.step import StepPlan, StepResult

_log = logging.getLogger(__name__)

_MAX_WAIT_S = 3600.0
"""How long the thread waits at once: a queue takes no timeout beyond a few centuries, but a time limit may be
longer."""
_CANCELLED = Finish(FinishReason.CANCELLED)
Stream = TypeVar("Stream", AsyncStream, ThreadStream)


class Engine:
    """Generates text, as a library or inside a server. A context manager: the scheduler thread runs within it."""

    def __init__(
        self,
        preparation: Preparation,
        scheduler: Scheduler,
        runner: Runner,
        sampler: Sampler,
        *,
        max_in_flight: int,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Takes the components that `load.py` builds. Events are delivered on `loop`, or else by the thread itself."""
        self.preparation = preparation
        self.load = EngineLoad(num_free_blocks=scheduler.num_free_blocks)
        self._scheduler = scheduler
        self._loop = loop
        self._outbox = Outbox(loop)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        commands = self._commands  # instead of `self`: the model of an engine without references is freed at once
        self._executor = StepExecutor(
            runner,
            sampler,
            on_mask_ready=lambda: commands.put(_wake_up),
            on_out_of_memory=scheduler.shrink_steps,
        )
        self._waits_for_masks = False
        """Whether no token can be chosen until a mask is ready, which a command will signal."""
        self._requests = RequestTable(max_in_flight)
        self._preparers = Preparers()
        self._state_futures: list[Future[EngineState]] = []
        self._lock = threading.Lock()
        self._refusal: UnavailableError | None = None
        self._running = True
        self._has_stopped = False
        self._epoch_s = time.time() - time.monotonic()
        self._progress_time_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def generate(self, request: GenerationRequest) -> Generation:
        """Blocks until the request has ended and returns its outputs. Raises the errors of `submit` and the stream."""
        return collect(self.stream(request))

    def stream(self, request: GenerationRequest) -> Iterator[OutputDelta]:
        """Yields the outputs piece by piece; closing the iterator early cancels the request.

        Raises the errors of `submit` and the stream.
        """
        stream = self.submit(request, ThreadStream)
        try:
            yield from stream
        finally:
            stream.cancel()

    def observe(self, observer: Observer) -> None:
        """Reports the steps and the requests that end from now on."""
        self._requests.observer = observer

    def submit(
        self,
        request: GenerationRequest | PreparedRequest,
        kind: type[Stream],
        *,
        context: Context | None = None,
        timeout_s: float | None = None,
    ) -> Stream:
        """Takes a place for a request, has it prepared, and returns its stream.

        `context` is the parent of the request's spans. A request that would take longer than `timeout_s`, after which
        its caller gives up, is refused. Raises DuplicateRequestError, OverloadedError or UnavailableError,
        InvalidRequestError if the number of outputs is wrong, and RuntimeError for a stream that could never be read.
        The errors of preparing, and later ones, are raised by the stream.
        """
        self._check_can_be_read(kind)
        wanted = request.request if isinstance(request, PreparedRequest) else request
        if violations := list(num_sequences_violations(wanted.sampling, self.preparation.limits)):
            self.preparation.check_briefly(wanted)  # raises the error with all that is wrong
            raise InvalidRequestError(*violations)
        stream = kind(wanted.request_id, lambda: self._send_end(reference, _CANCELLED))
        record: RequestRecord = RequestRecord(wanted, stream, context, self._now_s())
        reference: weakref.ref[RequestRecord] = weakref.ref(record)
        try:
            with self._lock:
                if self._refusal is not None:
                    raise type(self._refusal)(str(self._refusal))
                self._requests.add(record, self.load, timeout_s)
        except OverloadedError:
            self.preparation.check_briefly(wanted)  # an invalid request would be refused later, too
            raise
        if wanted.stopping.time_limit_s is not None:
            self._commands.put(_wake_up)  # the thread may wait for a later time
        if isinstance(request, PreparedRequest):
            self._schedule(record, request)
        elif self.preparation.is_quick(request):
            self._prepare(record)
        else:
            self._preparers.run(request, lambda: self._prepare(record))
        return stream

    def _check_can_be_read(self, kind: type[AsyncStream] | type[ThreadStream]) -> None:
        if kind is AsyncStream and self._loop is None:
            raise RuntimeError("the engine has no event loop: load it with one, or use a ThreadStream")
        if kind is ThreadStream and self._loop is not None and _running_loop() is self._loop:
            why = "would wait in the event loop that delivers its outputs"
            raise RuntimeError(f"a ThreadStream {why}: use another thread, or an AsyncStream")

    def _prepare(self, record: RequestRecord) -> None:
        """Prepares a request in any thread, unless its caller has gone."""
        if not self._requests.is_preparing(record):
            return
        try:
            prepared = self.preparation.prepare(record.request)
        except Exception as error:
            refusal = error
            if not isinstance(error, MptServerError):
                _log.exception("request %r could not be prepared", record.request.request_id)
                refusal = InternalError(f"the request could not be prepared: {type(error).__name__}")
            # The frames of a traceback would hold the request, in a cycle.
            refusal.__traceback__ = refusal.__cause__ = refusal.__context__ = None
            if self._requests.remove_preparing(record):
                self._outbox.put([(record.stream.receive, TokenEvent(0, error=refusal))])
        else:
            self._schedule(record, prepared)

    def _schedule(self, record: RequestRecord, prepared: PreparedRequest) -> None:
        reference = weakref.ref(record)
        assembly = request_assembly(
            prepared, self.preparation, lambda finish, index: self._send_end(reference, finish, index)
        )
        self._commands.put(lambda: self._add(record, prepared, assembly))

    def _send_end(self, reference: weakref.ref[RequestRecord], finish: Finish, index: int | None = None) -> None:
        """Has a request end, or one of its outputs.

        Streams only refer to their requests, which are freed with all that they hold as soon as they have ended.
        """
        if (record := reference()) is not None:
            self._commands.put(lambda: self._end(record, finish, index))

    def cancel(self, request_id: str) -> bool:
        """Cancels a request and frees its blocks before the next step; returns False if it is not in flight."""
        record = self._requests.get(request_id)
        if record is None:
            return False
        self._commands.put(lambda: self._end(record, _CANCELLED))
        return True

    def state(self) -> Future[EngineState]:
        """Returns a future for the engine's state after the current step. Raises UnavailableError if it has stopped."""
        future: Future[EngineState] = Future()
        with self._lock:
            if self._has_stopped:
                assert self._refusal is not None, "the engine refuses requests before it stops"
                raise type(self._refusal)(str(self._refusal))
            self._state_futures.append(future)
        self._commands.put(_wake_up)
        return future

    @property
    def num_in_flight(self) -> int:
        return len(self._requests)

    def refuse(self, why: UnavailableError) -> None:
        """Makes `submit` raise UnavailableError from now on; requests in flight continue."""
        with self._lock:
            self._refusal = self._refusal or why

    @property
    def failure(self) -> EngineStoppedError | None:
        """Why the thread has ended by itself, and with it all requests; None while it runs or if it was stopped."""
        return self._refusal if self._has_stopped and isinstance(self._refusal, EngineStoppedError) else None

    def close(self) -> None:
        """Stops the thread and ends all requests in flight with UnavailableError. Idempotent."""
        self.refuse(DrainingError("the engine is closed"))
        self._commands.put(self._stop)
        self._preparers.close()
        if self._thread.ident is not None:
            self._thread.join()

    def is_stalled(self, timeout_s: float) -> bool:
        """Whether the thread has died, or requests wait or run but no step has completed for `timeout_s`."""
        idle_s = time.monotonic() - self._progress_time_s
        return not self._thread.is_alive() or (self._requests.has_scheduled and idle_s > timeout_s)

    def _run(self) -> None:
        try:
            while self._running:
                self._run_commands()
                self._report_state()
                self._end_overdue()
                self._deliver()  # the events of requests that have just ended do not wait for the step
                plan = self._scheduler.plan()
                self._measure_load()  # before the step, which may be long
                self._waits_for_masks = False
                if plan.sequences:
                    self._mark_scheduled(plan)
                    start_s = time.monotonic()
                    result = self._executor.execute(plan)
                    duration_s = time.monotonic() - start_s
                    self._waits_for_masks = all(result.is_deferred(sequence) for sequence in plan.sequences)
                    events = self._scheduler.commit(plan, result, None if result.errors else duration_s)
                    num_new_tokens = Counter(
                        sequence.sequence_id for sequence, event in events if event.token_id is not None
                    )
                    number = self.load.num_steps
                    self._requests.report_step(plan, num_new_tokens, start_s + self._epoch_s, duration_s, number)
                    self._record_step(plan, result, events, num_new_tokens)
                self._deliver()
        except BaseException as error:
            _log.exception("the engine has stopped")
            self.refuse(EngineStoppedError(f"the engine has stopped: {error!r}"))
        finally:
            assert self._refusal is not None, "close() refuses before it stops the thread"
            self._fail_all(self._refusal)

    def _run_commands(self) -> None:
        if self._waits_for_masks or not self._scheduler.has_work:
            end_time_s = self._requests.next_end_time_s
            timeout_s = None if end_time_s is None else min(max(0.0, end_time_s - self._now_s()), _MAX_WAIT_S)
            with suppress(queue.Empty):
                self._commands.get(timeout=timeout_s)()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _add(self, record: RequestRecord, prepared: PreparedRequest, assembly: RequestAssembly) -> None:
        if not self._requests.is_preparing(record):
            return
        record.stream.begin(prepared, assembly)
        if not self._requests.has_scheduled:
            self._progress_time_s = time.monotonic()
        record.prepared = prepared
        added = self._scheduler.add(
            prepared.request, prepared.prompt_token_ids, prepared.matchers, complete=prepared.complete
        )
        self._requests.schedule(record, [sequence for sequence, _ in added])
        for sequence, finish in added:
            if finish is not None:
                self._requests.report(sequence, TokenEvent(sequence.index, finish=finish), self._now_s())

    def _end_overdue(self) -> None:
        for record in self._requests.overdue(self._now_s()):
            self._end(record, Finish(FinishReason.TIME_LIMIT))

    def _end(self, record: RequestRecord, finish: Finish, index: int | None = None) -> None:
        """Ends those of a request's outputs that have not ended, or only the one with the given index."""
        if not record.sequences and self._requests.remove_preparing(record):
            unprepared = PreparedRequest(record.request, (), ())
            record.stream.begin(unprepared, request_assembly(unprepared, self.preparation, lambda *_: None))
            self._requests.report_unprepared(record, finish, self._now_s())
        for sequence in record.sequences:
            if index in (None, sequence.index) and self._scheduler.end(sequence):
                self._executor.forget(sequence.sequence_id)
                self._requests.report(sequence, TokenEvent(sequence.index, finish=finish), self._now_s())

    def _mark_scheduled(self, plan: StepPlan) -> None:
        for sequence_id in plan.started:
            record = self._requests.by_sequence(sequence_id)
            if record is not None and record.scheduled_time_s is None:
                record.scheduled_time_s = self._now_s()

    def _record_step(
        self,
        plan: StepPlan,
        result: StepResult,
        events: Iterable[tuple[Sequence, TokenEvent]],
        num_new_tokens: Mapping[int, int],
    ) -> None:
        now_s, num_tokens = self._now_s(), sum(num_new_tokens.values())
        for sequence, event in events:
            if event.error is None:
                self._requests.report(sequence, event, now_s)
            elif (record := self._requests.by_sequence(sequence.sequence_id)) is not None:
                for one in record.sequences:
                    self._scheduler.end(one)
                    self._executor.forget(one.sequence_id)
                self._requests.fail(record, event.error, now_s)
        if result.token_ids or not result.errors:
            self._progress_time_s = time.monotonic()
        self.load = replace(
            self.load,
            num_steps=self.load.num_steps + 1,
            num_generated_tokens=self.load.num_generated_tokens + num_tokens,
            num_batched_sequences=self.load.num_batched_sequences + len(plan.sequences),
            num_draft_tokens=self.load.num_draft_tokens + plan.num_drafts,
            num_accepted_tokens=self.load.num_accepted_tokens + num_tokens - len(num_new_tokens),
            num_preemptions=self.load.num_preemptions + len(plan.preempted),
        )

    def _measure_load(self) -> None:
        self.load = replace(
            self.load,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_preparing=self._requests.num_preparing,
            num_free_blocks=self._scheduler.num_free_blocks,
        )

    def _deliver(self) -> None:
        self._measure_load()
        if events := self._requests.take_undelivered():
            self._outbox.put(events)

    def _report_state(self) -> None:
        if not self._state_futures:
            return
        with self._lock:
            futures, self._state_futures = self._state_futures, []
        self._measure_load()
        now_s, cached_blocks = self._now_s(), self._scheduler.cached_blocks
        state = EngineState(now_s, self.load, cached_blocks, self._requests.in_flight(now_s), self._requests.ended)
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_result(state)

    def _stop(self) -> None:
        self._running = False

    def _fail_all(self, why: UnavailableError) -> None:
        with self._lock:
            self._has_stopped = True
        for future in self._state_futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(type(why)(str(why)))
        self._requests.fail_all(lambda: type(why)(str(why)))
        self._executor.close()
        self._deliver()

    def _now_s(self) -> float:
        """Returns the time in seconds since the epoch, by a clock that never goes backwards."""
        return self._epoch_s + time.monotonic()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _wake_up() -> None:
    """A command that does nothing but wake up the scheduler thread."""
