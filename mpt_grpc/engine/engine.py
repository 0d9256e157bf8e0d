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
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

from opentelemetry.context import Context
from opentelemetry.trace import Tracer

from mpt_grpc.engine.admission import RequestLimits, admit, check_text_length
from mpt_grpc.engine.stream import AsyncStream, OutputAssembly, ThreadStream, collect
from mpt_grpc.errors import DeviceLostError, DuplicateRequestError, InternalError, OverloadedError, UnavailableError
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.request import (
    Finish,
    FinishReason,
    GenerationRequest,
    Output,
    OutputDelta,
    RequestStats,
    TokenEvent,
)
from mpt_grpc.schedule.scheduler import Progress, Scheduler
from mpt_grpc.schedule.sequence import Sequence
from mpt_grpc.step import StepPlan, StepResult
from mpt_grpc.telemetry.tracing import record_phases
from mpt_grpc.text.detokenizer import TextAssembler
from mpt_grpc.text.tokenizer import Tokenizer

_RETRY_AFTER_S = 1.0
_log = logging.getLogger(__name__)

Stream = TypeVar("Stream", AsyncStream, ThreadStream)


@dataclass(frozen=True)
class EngineLoad:
    """How busy the engine was after its last step; counters run since the start."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_steps: int = 0
    num_generated_tokens: int = 0
    num_batched_sequences: int = 0


@dataclass
class _Flight:
    """A request in flight: where its tokens go, and its account. Only the scheduler thread changes it."""

    request: GenerationRequest
    prompt_token_ids: tuple[int, ...]
    receive: Callable[[TokenEvent], None]
    context: Context | None
    arrival_time_s: float
    scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    num_output_tokens: int = 0


class Engine:
    """Generates text, with or without a server around it. A context manager: the thread runs inside."""

    def __init__(
        self,
        runner: Runner,
        sampler: Sampler,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        limits: RequestLimits,
        *,
        max_in_flight: int,
        tracer: Tracer | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Takes the parts as `load.py` makes them. With `loop`, events are delivered there, else in the thread."""
        self.tokenizer, self.limits = tokenizer, limits
        self.load = EngineLoad(num_free_blocks=scheduler.num_free_blocks)
        self._runner, self._sampler, self._scheduler = runner, sampler, scheduler
        self._max_in_flight, self._tracer, self._loop = max_in_flight, tracer, loop
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox: list[tuple[_Flight, TokenEvent]] = []
        self._flights: dict[str, _Flight] = {}
        self._admission = threading.Lock()
        self._closed: UnavailableError | None = None
        self._running = True
        self._epoch_s = time.time() - time.monotonic()
        self._progress_time_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def generate(self, request: GenerationRequest) -> Output:
        """Blocks until the request has ended and returns its whole output. Raises as `submit` does."""
        return collect(self.stream(request))

    def stream(self, request: GenerationRequest) -> Iterator[OutputDelta]:
        """Yields the output as it grows; leaving early ends the request. Raises as `submit` does."""
        stream = self.submit(request, ThreadStream)
        try:
            yield from stream
        finally:
            stream.cancel()

    def submit(
        self,
        request: GenerationRequest,
        kind: type[Stream],
        *,
        prompt_token_ids: tuple[int, ...] | None = None,
        context: Context | None = None,
    ) -> Stream:
        """Puts a request in flight and returns its stream.

        `prompt_token_ids` is the prompt's text in tokens, if the caller has them; `context` is the parent of its
        spans. Raises InvalidRequestError, DuplicateRequestError, OverloadedError or UnavailableError; a fault while
        it runs is raised by the stream.
        """
        if prompt_token_ids is None:
            prompt_token_ids = self.tokenize_prompt(request)
        request = admit(request, prompt_token_ids, self.limits)
        stopping = request.stopping
        detokenizer = self.tokenizer.detokenizer(prompt_token_ids, request.skip_special_tokens)
        text = TextAssembler(detokenizer, stopping.stop_strings, stopping.include_stop_string)
        stream = kind(request, prompt_token_ids, OutputAssembly(text, lambda: self._cancel(flight)))
        flight: _Flight = _Flight(request, prompt_token_ids, stream.receive, context, self._now_s())
        with self._admission:
            if self._closed is not None:
                raise UnavailableError(str(self._closed))
            if request.request_id in self._flights:
                raise DuplicateRequestError(f"request_id {request.request_id!r} is in flight already")
            if len(self._flights) >= self._max_in_flight:
                raise OverloadedError(f"{len(self._flights)} requests are in flight, no more may wait", _RETRY_AFTER_S)
            if not self._flights:
                self._progress_time_s = time.monotonic()
            self._flights[request.request_id] = flight
            self._inbox.put(lambda: self._scheduler.add(request, prompt_token_ids))
        return stream

    def tokenize_prompt(self, request: GenerationRequest) -> tuple[int, ...]:
        """The prompt's tokens. Raises InvalidRequestError for a text that no tokenization makes short enough."""
        if not isinstance(request.prompt, str):
            return request.prompt
        check_text_length(request.prompt, self.tokenizer.max_token_bytes, self.limits)
        return self.tokenizer.encode(request.prompt)

    def abort(self, request_id: str) -> bool:
        """Ends a request with CANCELLED before the next step; its blocks are free then. False: not in flight."""
        with self._admission:
            flight = self._flights.get(request_id)
        if flight is not None:
            self._cancel(flight)
        return flight is not None

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    def refuse(self, why: str) -> None:
        """From now on `submit` raises UnavailableError; what is in flight goes on."""
        with self._admission:
            self._closed = self._closed or UnavailableError(why)

    def close(self) -> None:
        """Ends what is in flight with UnavailableError and the thread with it. Idempotent."""
        self.refuse("the engine is closed")
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
                self._deliver()  # what mail has ended does not wait for the step
                plan = self._scheduler.plan()
                if plan.sequences:
                    self._mark_scheduled(plan)
                    result = self._compute(plan)
                    self._account(plan, result, self._scheduler.commit(plan, result))
                self._deliver()
        except BaseException as error:
            _log.exception("the engine has stopped")
            self.refuse(f"the engine has stopped: {error!r}")
        finally:
            assert self._closed is not None, "close() refuses before it stops the thread"
            self._fail_all(self._closed)

    def _take_mail(self) -> None:
        if not self._scheduler.has_work:
            self._inbox.get()()
        while True:
            try:
                mail = self._inbox.get_nowait()
            except queue.Empty:
                return
            mail()

    def _compute(self, plan: StepPlan) -> StepResult:
        try:
            logits = self._runner.run(plan)
            return self._sampler.sample(logits, [sequence for sequence in plan.sequences if sequence.samples])
        except DeviceLostError:
            raise
        except Exception as error:
            if len(plan.sequences) == 1:
                request_id = plan.sequences[0].request_id
                _log.exception("request %s failed", request_id)
                fault = InternalError(f"the engine failed: {type(error).__name__}")
                fault.__cause__ = error
                return StepResult({}, {request_id: fault})
            # Computing a step again is harmless, so each sequence is tried alone and only the faulty ones end.
            alone = [self._compute(StepPlan((sequence,))) for sequence in plan.sequences]
            return StepResult(
                {request_id: token for result in alone for request_id, token in result.token_ids.items()},
                {request_id: fault for result in alone for request_id, fault in result.errors.items()},
            )

    def _mark_scheduled(self, plan: StepPlan) -> None:
        for sequence in plan.sequences:
            flight = self._flights[sequence.request_id]
            if flight.scheduled_time_s is None:
                flight.scheduled_time_s = self._now_s()

    def _account(self, plan: StepPlan, result: StepResult, progress: Iterable[Progress]) -> None:
        for step in progress:
            flight = self._flights[step.sequence.request_id]
            if step.token_id is not None:
                flight.num_output_tokens += 1
                flight.first_token_time_s = flight.first_token_time_s or self._now_s()
            token_ids = () if step.token_id is None else (step.token_id,)
            event = TokenEvent(flight.request.request_id, token_ids, step.finish, step.error)
            if step.finish is not None or step.error is not None:
                stats = self._end(flight, step.sequence)
                event = replace(event, stats=stats)
            self._outbox.append((flight, event))
        if result.token_ids or not result.errors:
            self._progress_time_s = time.monotonic()
        self.load = replace(
            self.load,
            num_steps=self.load.num_steps + 1,
            num_generated_tokens=self.load.num_generated_tokens + len(result.token_ids),
            num_batched_sequences=self.load.num_batched_sequences + len(plan.sequences),
        )

    def _cancel(self, flight: _Flight) -> None:
        """Any thread may ask; a flight that has ended is passed over, even if its id is in flight again."""

        def end() -> None:
            request_id = flight.request.request_id
            if self._flights.get(request_id) is flight and (sequence := self._scheduler.end(request_id)) is not None:
                cancelled = TokenEvent(
                    request_id, (), Finish(FinishReason.CANCELLED), stats=self._end(flight, sequence)
                )
                self._outbox.append((flight, cancelled))

        self._inbox.put(end)

    def _end(self, flight: _Flight, sequence: Sequence) -> RequestStats:
        """Lets go of a flight and returns its account."""
        stats = RequestStats(
            num_prompt_tokens=len(flight.prompt_token_ids),
            num_cached_tokens=sequence.num_cached_tokens or 0,
            num_preemptions=sequence.num_preemptions,
            seed=flight.request.sampling.seed or 0,
            arrival_time_s=flight.arrival_time_s,
            scheduled_time_s=flight.scheduled_time_s,
            first_token_time_s=flight.first_token_time_s,
            end_time_s=self._now_s(),
        )
        if self._tracer is not None and flight.context is not None:
            record_phases(self._tracer, flight.context, stats, flight.num_output_tokens)
        del self._flights[flight.request.request_id]
        return stats

    def _deliver(self) -> None:
        self.load = replace(
            self.load,
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_free_blocks=self._scheduler.num_free_blocks,
        )
        batch, self._outbox = self._outbox, []
        if not batch:
            return
        if self._loop is None:
            _receive(batch)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_receive, batch)

    def _stop(self) -> None:
        self._running = False

    def _fail_all(self, why: UnavailableError) -> None:
        for request_id, flight in self._flights.items():
            self._outbox.append((flight, TokenEvent(request_id, error=UnavailableError(str(why)))))
        self._flights.clear()
        self._deliver()

    def _now_s(self) -> float:
        """Seconds since the epoch, by a clock that never goes back."""
        return self._epoch_s + time.monotonic()


def _receive(batch: list[tuple[_Flight, TokenEvent]]) -> None:
    for flight, event in batch:
        flight.receive(event)
