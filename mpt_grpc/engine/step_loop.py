"""The loop of the scheduler thread, which alone accesses the model, the cache and the sequences: it plans a step,
launches it, and reports what it did. On an accelerator, it plans and launches the next one while that one runs.

Other threads send it commands through a queue: to add a request, to end one or one of its outputs, and to stop. It
sends back token events through an outbox.
"""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from mpt_grpc.engine.assembly import RequestAssembly
from mpt_grpc.engine.executor import LaunchedStep, StepExecutor
from mpt_grpc.engine.inquiries import StateInquiries
from mpt_grpc.engine.outbox import Outbox
from mpt_grpc.engine.outputs import request_assembly
from mpt_grpc.engine.prepare import Preparation, PreparedRequest
from mpt_grpc.engine.request_record import RequestRecord
from mpt_grpc.engine.request_table import RequestTable
from mpt_grpc.engine.state import EngineLoad, EngineState
from mpt_grpc.errors import DeviceLostError, UnavailableError
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.results import Finish, FinishReason, TokenEvent
from mpt_grpc.schedule.scheduler import Scheduler
from mpt_grpc.schedule.sequence import Sequence
from mpt_grpc.step import StepPlan, StepResult

_Item = TypeVar("_Item")
_MAX_WAIT_S = 3600.0
"""How long the thread waits at once: a queue takes no timeout beyond a few centuries, but a time limit may be
longer."""
_SHORT_S = 0.005
"""The processor time for commands, or for ends, between the shortest steps. Connections that close may end 1,000
requests at once, which takes some 50 ms."""
_LATE_INTERVAL_S = 0.02
"""Looking through 300 requests takes 0.2 ms, a tenth of the shortest steps of a large batch."""


class StepLoop:
    """Runs steps while there is work.

    Any thread may call `add`, `end`, `wake_up`, `stop`, `is_stalled` and `now_s`, and read `load`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        sampler: Sampler,
        preparation: Preparation,
        requests: RequestTable,
        outbox: Outbox,
        *,
        runs_ahead: bool,
    ) -> None:
        """With `runs_ahead`, a step is launched before the result of the one before is read, where that is possible."""
        self.load = EngineLoad(num_free_blocks=scheduler.num_free_blocks)
        self.inquiries = StateInquiries()
        self._scheduler, self._preparation, self._requests, self._outbox = scheduler, preparation, requests, outbox
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        commands = self._commands  # instead of `self`: the model of an engine without references is freed at once
        self._executor = StepExecutor(
            runner,
            sampler,
            on_mask_ready=lambda: commands.put(_nothing),
            on_out_of_memory=scheduler.shrink_steps,
        )
        self._runs_ahead = runs_ahead
        self._in_flight: LaunchedStep | None = None
        """The step that was launched last, until its results are applied."""
        self._completion_s = 0.0
        """When the last step was complete, by the monotonic clock."""
        self._next_late_s = 0.0
        """When to look for requests that would end too late."""
        self._waits_for_masks = False
        """Whether no token can be chosen until a mask is ready, which a command will signal."""
        self._running, self._is_stopping = True, False
        self._step_s = 0.0
        """How long the last step took."""
        self._epoch_s = time.time() - time.monotonic()
        self._progress_time_s = time.monotonic()

    def add(self, record: RequestRecord, prepared: PreparedRequest, assembly: RequestAssembly) -> None:
        """Has a prepared request scheduled, unless it has ended."""
        self._commands.put(lambda: self._add(record, prepared, assembly))

    def end(self, record: RequestRecord, finish: Finish, index: int | None = None) -> None:
        """Has those of a request's outputs end that have not ended, or only the one with the given index."""
        self._commands.put(lambda: self._end(record, finish, index))

    def wake_up(self) -> None:
        """Has the loop look at its time limits and inquiries, which may have changed."""
        self._commands.put(_nothing)

    def stop(self) -> None:
        """Has `run` return after the step."""
        self._is_stopping = True
        self._commands.put(self._stop)

    def is_stalled(self, timeout_s: float) -> bool:
        """Whether requests wait or run but no step has completed for `timeout_s`."""
        idle_s = time.monotonic() - self._progress_time_s
        return self._requests.has_scheduled and idle_s > timeout_s

    def now_s(self) -> float:
        """Returns the time in seconds since the epoch, by a clock that never goes backwards."""
        return self._epoch_s + time.monotonic()

    def run(self) -> None:
        """Runs in the scheduler thread until `stop`. Raises an error after which no step can be computed."""
        while self._running:
            self._run_commands()
            self.inquiries.answer(self._state)
            self._end_overdue()
            self._deliver()  # the events of requests that have just ended do not wait for the step
            plan = self._scheduler.plan()  # on an accelerator, the step before is in flight
            self._measure_load()  # before the step, which may be long
            previous, self._in_flight = self._in_flight, self._launch(plan) if plan.sequences else None
            self._refuse_late()
            self._complete(previous)
            if not (self._runs_ahead and self._in_flight is not None and self._in_flight.may_be_followed):
                self._complete_last()
            self._deliver()
        self._complete_last()

    def close(self, why: UnavailableError) -> None:
        """Ends all requests in flight with `why`, after `run`."""
        self.inquiries.refuse(why)
        self._requests.fail_all(why, self.now_s())
        self._executor.close()
        self._deliver()

    def _run_commands(self) -> None:
        if self._in_flight is None and (self._waits_for_masks or not self._scheduler.has_work):
            end_time_s = self._requests.next_end_time_s
            timeout_s = None if end_time_s is None else min(max(0.0, end_time_s - self.now_s()), _MAX_WAIT_S)
            with suppress(queue.Empty):
                self._commands.get(timeout=timeout_s)()
        for command in self._while_short(self._waiting_commands()):
            command()

    def _waiting_commands(self) -> Iterator[Callable[[], None]]:
        with suppress(queue.Empty):
            while True:
                yield self._commands.get_nowait()

    def _while_short(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yields items for as long as the last step took, in processor time; the others are left for later, unless the
        loop is to stop."""
        end_s = time.thread_time() + max(_SHORT_S, self._step_s)
        for item in items:
            yield item
            if time.thread_time() > end_s and not self._is_stopping:
                return

    def _launch(self, plan: StepPlan) -> LaunchedStep:
        self._mark_scheduled(plan)
        return self._executor.launch(plan, self._in_flight)

    def _complete_last(self) -> None:
        """Waits for the step that was launched last, if there is one in flight, and applies its result."""
        last, self._in_flight = self._in_flight, None
        self._complete(last)

    def _complete(self, step: LaunchedStep | None) -> None:
        """Waits for a step, if there is one, and applies its result. If it fails, the one launched after it is void."""
        if step is None:
            return
        plan = computed = step.plan
        is_measured = False
        try:
            result = step.result()
            is_measured = not result.errors
        except DeviceLostError:
            raise
        except Exception as error:
            self._in_flight = None
            computed = self._scheduler.recover(plan)
            result = self._executor.repeat(plan, computed, error)
        start_s, self._completion_s = max(step.start_s, self._completion_s), time.monotonic()
        duration_s = self._step_s = self._completion_s - start_s
        self._waits_for_masks = bool(computed.sequences) and all(map(result.is_deferred, computed.sequences))
        events = self._scheduler.commit(plan, result, duration_s if is_measured else None)
        new_tokens = Counter(sequence.sequence_id for sequence, event in events if event.token_id is not None)
        if is_measured:
            self._requests.measure_step(new_tokens, duration_s)
        self._requests.report_step(plan, new_tokens, start_s + self._epoch_s, duration_s, self.load.num_steps)
        self._record_step(plan, result, events, new_tokens)

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
                self._requests.report(sequence, TokenEvent(sequence.index, finish=finish), self.now_s())

    def _end_overdue(self) -> None:
        for record in self._while_short(self._requests.overdue(self.now_s())):
            self._end(record, Finish(FinishReason.TIME_LIMIT))

    def _refuse_late(self) -> None:
        """Has no step compute what its caller will not wait for, among the requests for which there was no room."""
        if self._scheduler.num_waiting and (now_s := self.now_s()) >= self._next_late_s:
            self._next_late_s = now_s + _LATE_INTERVAL_S
            for record, error in self._while_short(self._requests.late(now_s)):
                self._fail(record, error)

    def _fail(self, record: RequestRecord, error: Exception) -> None:
        for sequence in record.sequences:
            self._scheduler.end(sequence)
            self._executor.forget(sequence.sequence_id)
        self._requests.fail(record, error, self.now_s())

    def _end(self, record: RequestRecord, finish: Finish, index: int | None = None) -> None:
        if not record.sequences and self._requests.remove_preparing(record):
            unprepared = PreparedRequest(record.request, (), ())
            record.stream.begin(unprepared, request_assembly(unprepared, self._preparation, lambda *_: None))
            self._requests.report_unprepared(record, finish, self.now_s())
        for sequence in record.sequences:
            if index in (None, sequence.index) and self._scheduler.end(sequence):
                self._executor.forget(sequence.sequence_id)
                self._requests.report(sequence, TokenEvent(sequence.index, finish=finish), self.now_s())

    def _mark_scheduled(self, plan: StepPlan) -> None:
        for sequence_id in plan.started:
            record = self._requests.by_sequence(sequence_id)
            if record is not None and record.scheduled_time_s is None:
                record.scheduled_time_s = self.now_s()

    def _record_step(
        self,
        plan: StepPlan,
        result: StepResult,
        events: Iterable[tuple[Sequence, TokenEvent]],
        num_new_tokens: Mapping[int, int],
    ) -> None:
        now_s, num_tokens = self.now_s(), sum(num_new_tokens.values())
        for sequence, event in events:
            if event.error is None:
                self._requests.report(sequence, event, now_s)
            elif (record := self._requests.by_sequence(sequence.sequence_id)) is not None:
                self._fail(record, event.error)
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
            num_free_blocks=self._scheduler.num_free_blocks,
        )

    def _deliver(self) -> None:
        tokens, ends = self._requests.take_undelivered()
        if tokens or ends:
            self._measure_load()
            self._outbox.put(tokens, ends)

    def _state(self) -> EngineState:
        self._measure_load()
        now_s = self.now_s()
        in_flight = self._requests.in_flight(now_s)
        # Other threads begin and end the preparation of requests meanwhile: the load counts those that are shown.
        load = replace(self.load, num_preparing=sum(not request.sequences for request in in_flight))
        return EngineState(now_s, load, self._scheduler.cached_blocks, in_flight, self._requests.ended)

    def _stop(self) -> None:
        self._running = False


def _nothing() -> None:
    """A command that only wakes the thread up."""
