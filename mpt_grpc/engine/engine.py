"""The scheduler thread. It alone touches the model, the cache and the state of requests.

Into it goes mail (submit, abort, close), out of it come token events: a whole step's in one call to the readers' loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

from opentelemetry.context import Context
from opentelemetry.trace import Tracer

from mpt_grpc.engine.assembly import OutputAssembly, RequestAssembly
from mpt_grpc.engine.flights import Flight, Flights
from mpt_grpc.engine.masks import MaskWorkers
from mpt_grpc.engine.prepare import Preparation, PreparedRequest
from mpt_grpc.engine.state import EngineLoad, EngineState
from mpt_grpc.engine.stream import AsyncStream, ThreadStream, collect
from mpt_grpc.errors import DeviceLostError, DrainingError, EngineStoppedError, InternalError, UnavailableError
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.request import (
    Finish,
    FinishReason,
    Generation,
    GenerationRequest,
    OutputDelta,
    TokenEvent,
)
from mpt_grpc.schedule.scheduler import Progress, Scheduler
from mpt_grpc.schedule.sequence import Sequence
from mpt_grpc.step import StepPlan, StepResult, merged
from mpt_grpc.text.detokenizer import TextAssembler
from mpt_grpc.text.guards import watch_all

_log = logging.getLogger(__name__)

Stream = TypeVar("Stream", AsyncStream, ThreadStream)


class Engine:
    """Generates text, with or without a server around it. A context manager: the thread runs inside."""

    def __init__(
        self,
        preparation: Preparation,
        scheduler: Scheduler,
        runner: Runner,
        sampler: Sampler,
        *,
        max_in_flight: int,
        tracer: Tracer | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Takes the parts as `load.py` makes them. With `loop`, events are delivered there, else in the thread."""
        self.preparation = preparation
        self.load = EngineLoad(num_free_blocks=scheduler.num_free_blocks)
        self._scheduler, self._runner, self._sampler = scheduler, runner, sampler
        self._loop = loop
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._masks = MaskWorkers(on_ready=lambda: self._inbox.put(_wake_up))
        self._waits_for_masks = False
        """Whether nothing can be chosen before a mask is ready, which comes as mail."""
        self._flights = Flights(max_in_flight, tracer)
        self._watchers: list[Future[EngineState]] = []
        self._admission = threading.Lock()
        self._closed: UnavailableError | None = None
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
        """Blocks until the request has ended and returns its whole outputs. Raises as `prepare` and `submit` do."""
        return collect(self.stream(request))

    def stream(self, request: GenerationRequest) -> Iterator[OutputDelta]:
        """Yields the outputs as they grow; leaving early ends the request. Raises as `prepare` and `submit` do."""
        stream = self.submit(self.preparation.prepare(request), ThreadStream)
        try:
            yield from stream
        finally:
            stream.cancel()

    def submit(self, prepared: PreparedRequest, kind: type[Stream], *, context: Context | None = None) -> Stream:
        """Puts a request in flight and returns its stream; `context` is the parent of its spans.

        Raises DuplicateRequestError, OverloadedError or UnavailableError; a fault while it runs is raised by the
        stream.
        """

        def ending(index: int) -> Callable[[], None]:
            return lambda: self._cancel(flight, index)

        num_sequences = prepared.request.sampling.num_sequences
        outputs = [self._assembly(prepared, index, ending(index)) for index in range(num_sequences)]
        stream = kind(prepared, RequestAssembly(outputs, lambda: self._cancel(flight)))
        flight: Flight = Flight(prepared, stream.receive, context, self._now_s())
        with self._admission:
            if self._closed is not None:
                raise type(self._closed)(str(self._closed))
            was_idle = not self._flights
            self._flights.enter(flight)
            if was_idle:
                self._progress_time_s = time.monotonic()
            self._inbox.put(lambda: self._add(flight))
        return stream

    def cancel(self, request_id: str) -> bool:
        """Ends a request with CANCELLED before the next step; its blocks are free then. False: not in flight."""
        flight = self._flights.get(request_id)
        if flight is not None:
            self._cancel(flight)
        return flight is not None

    def state(self) -> Future[EngineState]:
        """What the engine is doing, as it is after the step that runs. Raises UnavailableError if it has stopped."""
        watcher: Future[EngineState] = Future()
        with self._admission:
            if self._has_stopped:
                assert self._closed is not None, "the engine refuses requests before it stops"
                raise type(self._closed)(str(self._closed))
            self._watchers.append(watcher)
        self._inbox.put(_wake_up)
        return watcher

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    def refuse(self, why: UnavailableError) -> None:
        """From now on `submit` raises UnavailableError; what is in flight goes on."""
        with self._admission:
            self._closed = self._closed or why

    def close(self) -> None:
        """Ends what is in flight with UnavailableError and the thread with it. Idempotent."""
        self.refuse(DrainingError("the engine is closed"))
        self._inbox.put(self._stop)
        if self._thread.ident is not None:
            self._thread.join()

    def is_stuck(self, timeout_s: float) -> bool:
        """Whether the thread has died, or work waits and nothing has come of it for `timeout_s`."""
        idle_s = time.monotonic() - self._progress_time_s
        return not self._thread.is_alive() or (bool(self._flights) and idle_s > timeout_s)

    def _run(self) -> None:
        try:
            while self._running:
                self._take_mail()
                self._answer_watchers()
                self._end_overdue()
                self._deliver()  # what has ended does not wait for the step
                plan = self._scheduler.plan()
                self._waits_for_masks = False
                if plan.sequences:
                    self._mark_scheduled(plan)
                    result = self._compute(plan)
                    self._waits_for_masks = all(result.is_deferred(sequence) for sequence in plan.sequences)
                    self._account(plan, result, self._scheduler.commit(plan, result))
                self._deliver()
        except BaseException as error:
            _log.exception("the engine has stopped")
            self.refuse(EngineStoppedError(f"the engine has stopped: {error!r}"))
        finally:
            assert self._closed is not None, "close() refuses before it stops the thread"
            self._fail_all(self._closed)

    def _take_mail(self) -> None:
        if self._waits_for_masks or not self._scheduler.has_work:
            self._inbox.get()()
        while True:
            try:
                mail = self._inbox.get_nowait()
            except queue.Empty:
                return
            mail()

    def _add(self, flight: Flight) -> None:
        prepared = flight.prepared
        added = self._scheduler.add(prepared.request, prepared.prompt_token_ids, prepared.matchers)
        self._flights.start(flight, [progress.sequence for progress in added])
        for progress in added:
            if progress.finish is not None:
                self._flights.tell(progress, self._now_s())

    def _end_overdue(self) -> None:
        for flight in self._flights.overdue(self._now_s()):
            self._end(flight.sequences, FinishReason.TIME_LIMIT)

    def _cancel(self, flight: Flight, index: int | None = None) -> None:
        """Ends a flight, or one sequence of it. Any thread may ask; what has ended is passed over."""

        def end() -> None:
            self._end(flight.sequences if index is None else [flight.sequences[index]], FinishReason.CANCELLED)

        self._inbox.put(end)

    def _end(self, sequences: Iterable[Sequence], reason: FinishReason) -> None:
        for sequence in sequences:
            if self._scheduler.end(sequence):
                self._masks.forget(sequence.sequence_id)
                self._flights.tell(Progress(sequence, finish=Finish(reason)), self._now_s())

    def _compute(self, plan: StepPlan) -> StepResult:
        try:
            self._masks.start(plan)
            scores = self._runner.run(plan)
            masks = self._masks.collect(plan)
            chooses = [sequence for sequence in plan.sequences if sequence.sampling is not None]
            ready = [row for row, sequence in enumerate(chooses) if masks.is_ready(sequence)]
            logits = scores.logits if len(ready) == len(chooses) else scores.logits[ready]
            result = self._sampler.sample(logits, [chooses[row] for row in ready], masks.bits)
            errors = {**result.errors, **masks.errors}
            return replace(result, prompt_logprobs=scores.prompt_logprobs, errors=errors)
        except DeviceLostError:
            raise
        except Exception as error:
            if len(plan.sequences) == 1:
                _log.exception("request %s failed", plan.sequences[0].request_id)
                fault = InternalError(f"the engine failed: {type(error).__name__}")
                fault.__cause__ = error
                return StepResult({}, errors={plan.sequences[0].sequence_id: fault})
            # Computing a step again is harmless, so each sequence is tried alone and only the faulty ones end.
            return merged([self._compute(StepPlan((sequence,))) for sequence in plan.sequences])

    def _mark_scheduled(self, plan: StepPlan) -> None:
        for sequence in plan.sequences:
            flight = self._flights.of(sequence.sequence_id)
            if flight is not None and flight.scheduled_time_s is None:
                flight.scheduled_time_s = self._now_s()

    def _account(self, plan: StepPlan, result: StepResult, progress: Iterable[Progress]) -> None:
        now_s = self._now_s()
        for step in progress:
            flight = self._flights.of(step.sequence.sequence_id)
            if step.error is None:
                self._flights.tell(step, now_s)
            elif flight is not None:
                for sequence in flight.sequences:
                    self._scheduler.end(sequence)
                    self._masks.forget(sequence.sequence_id)
                self._flights.fail(flight, step.error, now_s)
        if result.token_ids or not result.errors:
            self._progress_time_s = time.monotonic()
        self.load = replace(
            self.load,
            num_steps=self.load.num_steps + 1,
            num_generated_tokens=self.load.num_generated_tokens + len(result.token_ids),
            num_batched_sequences=self.load.num_batched_sequences + len(plan.sequences),
        )

    def _deliver(self) -> None:
        self.load = replace(
            self.load,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_free_blocks=self._scheduler.num_free_blocks,
        )
        batch = self._flights.take_outbox()
        if not batch:
            return
        if self._loop is None:
            _receive(batch)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_receive, batch)

    def _assembly(self, prepared: PreparedRequest, index: int, end_sequence: Callable[[], None]) -> OutputAssembly:
        request, preparation = prepared.request, self.preparation
        stopping = request.stopping
        text = TextAssembler(
            preparation.tokenizer.detokenizer(prepared.prompt_token_ids, request.skip_special_tokens),
            stopping.stop_strings,
            stopping.include_stop_string,
            stopping.min_new_tokens,
        )
        watch = watch_all(preparation.guards) if preparation.guards else None
        return OutputAssembly(index, text, watch, end_sequence, request.resume_token_ids)

    def _answer_watchers(self) -> None:
        if not self._watchers:
            return
        with self._admission:
            watchers, self._watchers = self._watchers, []
        now_s, kept_blocks = self._now_s(), self._scheduler.cached_blocks
        state = EngineState(now_s, self.load, kept_blocks, self._flights.in_flight(now_s), self._flights.ended)
        for watcher in watchers:
            watcher.set_result(state)

    def _stop(self) -> None:
        self._running = False

    def _fail_all(self, why: UnavailableError) -> None:
        with self._admission:
            self._has_stopped = True
        for watcher in self._watchers:
            watcher.set_exception(type(why)(str(why)))
        self._flights.fail_all(lambda: type(why)(str(why)))
        self._masks.close()
        self._deliver()

    def _now_s(self) -> float:
        """Seconds since the epoch, by a clock that never goes back."""
        return self._epoch_s + time.monotonic()


def _wake_up() -> None:
    """Mail that says no more than that it has come."""


def _receive(batch: list[tuple[Flight, TokenEvent]]) -> None:
    for flight, event in batch:
        flight.receive(event)
