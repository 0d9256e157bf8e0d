"""The engine as other threads use it: it takes requests, has them prepared and scheduled, and returns their streams.

The scheduler thread computes the steps, in `step_loop.py`. docs/architecture.md shows the whole way of a request.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import TypeVar

from opentelemetry.context import Context

from mpt_grpc.engine.outbox import Outbox
from mpt_grpc.engine.outputs import request_assembly
from mpt_grpc.engine.prepare import Preparation, PreparedRequest, Preparers
from mpt_grpc.engine.request_record import RequestRecord
from mpt_grpc.engine.request_table import RequestTable
from mpt_grpc.engine.state import EngineLoad, EngineState
from mpt_grpc.engine.step_loop import StepLoop
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
from mpt_grpc.request import GenerationRequest
from mpt_grpc.results import Finish, FinishReason, Generation, OutputDelta, TokenEvent
from mpt_grpc.schedule.scheduler import Scheduler
from mpt_grpc.text.probe import SlowConstraintError

_log = logging.getLogger(__name__)

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
        runs_ahead: bool,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Takes the components that `load.py` builds. `runs_ahead` is that of `StepLoop`.

        Events are delivered on `loop`, or else by the thread itself.
        """
        self.preparation = preparation
        self._loop = loop
        self._outbox = Outbox(loop)
        self._requests = RequestTable(max_in_flight)
        self._steps = StepLoop(
            scheduler, runner, sampler, preparation, self._requests, self._outbox, runs_ahead=runs_ahead
        )
        self._preparers = Preparers()
        self._lock = threading.Lock()
        self._refusal: UnavailableError | None = None
        self._has_stopped = False
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
        record: RequestRecord = RequestRecord(wanted, stream, context, self._steps.now_s(), timeout_s)
        reference: weakref.ref[RequestRecord] = weakref.ref(record)
        try:
            with self._lock:
                if self._refusal is not None:
                    raise self._refusal.again()
                self._requests.add(record, self.load)
        except OverloadedError:
            self.preparation.check_briefly(wanted)  # an invalid request would be refused later, too
            raise
        if wanted.stopping.time_limit_s is not None:
            self._steps.wake_up()  # the thread may wait for a later time
        if isinstance(request, PreparedRequest):
            self._prepare(record, request)
        elif self.preparation.is_quick(request):
            self._prepare(record)
        else:
            threads = self._preparers.texts if request.constraint is None else self._preparers.constraints
            threads.submit(lambda: self._prepare(record, may_be_slow=False), record.turn)
        return stream

    def _check_can_be_read(self, kind: type[AsyncStream] | type[ThreadStream]) -> None:
        if kind is AsyncStream and self._loop is None:
            raise RuntimeError("the engine has no event loop: load it with one, or use a ThreadStream")
        if kind is ThreadStream and self._loop is not None and _running_loop() is self._loop:
            why = "would wait in the event loop that delivers its outputs"
            raise RuntimeError(f"a ThreadStream {why}: use another thread, or an AsyncStream")

    def _prepare(
        self, record: RequestRecord, prepared: PreparedRequest | None = None, *, may_be_slow: bool = True
    ) -> None:
        """Prepares a request in any thread, unless its caller has gone, and has it scheduled."""
        if not self._requests.is_preparing(record):
            return
        reference = weakref.ref(record)
        try:
            ready = prepared or self.preparation.prepare(record.request, may_be_slow=may_be_slow)
            assembly = request_assembly(
                ready, self.preparation, lambda finish, index: self._send_end(reference, finish, index)
            )
        except SlowConstraintError:
            record.turn = Future()
            self._preparers.slow_constraints.submit(lambda: self._prepare(record), record.turn)
            if not self._requests.is_preparing(record):  # it has ended before it had this turn
                record.turn.cancel()
        except Exception as error:
            refusal = error
            if not isinstance(error, MptServerError):
                _log.exception("request %r could not be prepared", record.request.request_id)
                refusal = InternalError(f"the request could not be prepared: {type(error).__name__}")
            # The frames of a traceback would hold the request, in a cycle.
            refusal.__traceback__ = refusal.__cause__ = refusal.__context__ = None
            if self._requests.remove_preparing(record):
                self._outbox.put((), [(record.stream.receive, TokenEvent(0, error=refusal))])
        else:
            self._steps.add(record, ready, assembly)

    def _send_end(self, reference: weakref.ref[RequestRecord], finish: Finish, index: int | None = None) -> None:
        """Has a request end, or one of its outputs.

        Streams only refer to their requests, which are freed with all that they hold as soon as they have ended.
        """
        if (record := reference()) is not None:
            self._steps.end(record, finish, index)

    def cancel(self, request_id: str) -> bool:
        """Cancels a request and frees its blocks before one of the next steps; returns False if it is not in flight."""
        record = self._requests.get(request_id)
        if record is None:
            return False
        self._steps.end(record, _CANCELLED)
        return True

    def state(self) -> Future[EngineState]:
        """Returns a future for the engine's state after the current step. Raises UnavailableError if it has stopped."""
        future = self._steps.inquiries.ask()
        self._steps.wake_up()
        return future

    @property
    def load(self) -> EngineLoad:
        """The load after the last step, and the requests that are being prepared now."""
        return replace(self._steps.load, num_preparing=self._requests.num_preparing)

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
        self._steps.stop()
        self._preparers.close()
        if self._thread.ident is not None:
            self._thread.join()

    async def delivered(self) -> None:
        """Waits until all events and reports so far have been received; to be called on the loop that receives them."""
        await self._outbox.delivered()

    def is_stalled(self, timeout_s: float) -> bool:
        """Whether the thread has died, or requests wait or run but no step has completed for `timeout_s`."""
        return not self._thread.is_alive() or self._steps.is_stalled(timeout_s)

    def _run(self) -> None:
        try:
            self._steps.run()
        except BaseException as error:
            _log.exception("the engine has stopped")
            self.refuse(EngineStoppedError(f"the engine has stopped: {error!r}"))
        finally:
            assert self._refusal is not None, "close() refuses before it stops the thread"
            self._has_stopped = True
            self._steps.close(self._refusal)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
