"""The spans of requests and steps, recorded from the engine's reports when they have ended.

Contexts are passed as arguments because the engine has no current span.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Link, Span, StatusCode, Tracer, get_current_span
from opentelemetry.util.types import AttributeValue

from mpt_grpc.conversation import Conversation
from mpt_grpc.errors import InternalError, MptServerError
from mpt_grpc.reports import RequestReport, StepReport
from mpt_grpc.request import GenerationRequest
from mpt_grpc.step import StepPlan
from mpt_grpc.telemetry import names

_MAX_EVENTS = 100
"""The number of events of a request that are kept; OpenTelemetry keeps 128 of a span."""
_Attributes = Mapping[str, AttributeValue]


class Event(NamedTuple):
    """What happened to a request at `time_s`, in seconds since the epoch."""

    time_s: float
    name: str
    attributes: _Attributes


@dataclass
class Timeline:
    """What the steps did for a request."""

    events: list[Event] = field(default_factory=list)
    num_drafts: int = 0
    num_accepted: int = 0

    def add(self, time_s: float, name: str, attributes: _Attributes) -> None:
        if len(self.events) < _MAX_EVENTS:
            self.events.append(Event(time_s, name, attributes))


class Timelines:
    """The timelines of the requests in progress for which anything but one token in each step has happened."""

    def __init__(self) -> None:
        self._by_request_id: dict[str, Timeline] = {}

    def add(self, report: StepReport) -> None:
        """Adds a step to the timelines of its requests, except those that have ended."""
        plan, start_s, end_s = report.plan, report.start_time_s, report.start_time_s + report.duration_s
        for request_ids, event in ((plan.preempted, names.EVENT_PREEMPTION), (plan.resumed, names.EVENT_RESUMPTION)):
            for request_id in request_ids:
                if request_id not in report.ended:
                    self._of(request_id).add(start_s, event, {})
        for step in plan.sequences if plan.num_tokens > len(plan.sequences) else ():
            if step.request_id in report.ended:
                continue
            num_known = step.num_known
            if num_known > 1:
                self._of(step.request_id).add(end_s, names.EVENT_CHUNK, {names.NUM_TOKENS: num_known})
            if num_drafts := len(step.token_ids) - num_known:
                timeline = self._of(step.request_id)
                num_accepted = max(0, report.num_new_tokens.get(step.sequence_id, 0) - 1)
                timeline.num_drafts += num_drafts
                timeline.num_accepted += num_accepted
                timeline.add(
                    end_s,
                    names.EVENT_SPECULATION,
                    {names.DRAFT_TOKENS: num_drafts, names.ACCEPTED_TOKENS: num_accepted},
                )

    def take(self, request_id: str) -> Timeline:
        """Removes and returns the timeline of a request that has ended."""
        return self._by_request_id.pop(request_id, Timeline())

    def _of(self, request_id: str) -> Timeline:
        return self._by_request_id.setdefault(request_id, Timeline())


def record_phases(tracer: Tracer, report: RequestReport, timeline: Timeline) -> None:
    """Records the spans `queue`, `prefill` and `decode` of an ended request as children of the span in its context.

    The engine may end a request after its caller has left. The spans then end with that of the call.
    """
    assert report.context is not None
    stats = report.stats
    parent = get_current_span(report.context)
    call_end = parent.end_time if isinstance(parent, ReadableSpan) else None
    phases = _Phases(tracer, report.context, call_end)
    phases.add(names.SPAN_QUEUE, stats.arrival_time_s, stats.scheduled_time_s or stats.end_time_s, {})
    if stats.scheduled_time_s is not None:
        prefill_end_s = stats.first_token_time_s or stats.end_time_s
        phases.add(
            names.SPAN_PREFILL,
            stats.scheduled_time_s,
            prefill_end_s,
            {names.USAGE_INPUT_TOKENS: stats.num_prompt_tokens, names.CACHED_TOKENS: stats.num_cached_tokens},
            [event for event in timeline.events if event.time_s <= prefill_end_s],
        )
        if stats.first_token_time_s is not None:
            first = Event(stats.first_token_time_s, names.EVENT_FIRST_TOKEN, {})
            phases.add(
                names.SPAN_DECODE,
                stats.first_token_time_s,
                stats.end_time_s,
                {names.USAGE_OUTPUT_TOKENS: stats.num_output_tokens, names.PREEMPTIONS: stats.num_preemptions}
                | _speculation(timeline),
                [first, *(event for event in timeline.events if event.time_s > prefill_end_s)],
            )
    phases.end(report)


class _Phases:
    """Records spans one after the other."""

    def __init__(self, tracer: Tracer, context: Context, call_end: int | None) -> None:
        """call_end: when the call ended, in nanoseconds, if it has."""
        self._tracer, self._context, self._call_end = tracer, context, call_end
        self._last: tuple[Span, int] | None = None

    def add(
        self, name: str, start_s: float, end_s: float, attributes: _Attributes, events: Iterable[Event] = ()
    ) -> None:
        self._end_last()
        span = self._tracer.start_span(name, self._context, attributes=attributes, start_time=self._time(start_s))
        for event in events:
            span.add_event(event.name, event.attributes, self._time(event.time_s))
        self._last = span, self._time(end_s)

    def end(self, report: RequestReport) -> None:
        """Ends the last span with the finish of the request, or its error."""
        assert self._last is not None
        span, _ = self._last
        if report.error is not None:
            reasoned = report.error if isinstance(report.error, MptServerError) else InternalError()
            span.set_attribute(names.ERROR_TYPE, reasoned.reason)
            span.set_status(StatusCode.ERROR)
        else:
            reasons = [reason.name.lower() for reason in report.finish_reasons]
            span.set_attribute(names.RESPONSE_FINISH_REASONS, reasons)
        self._end_last()

    def _end_last(self) -> None:
        if self._last is not None:
            span, end = self._last
            span.end(end)

    def _time(self, time_s: float) -> int:
        nanoseconds = int(time_s * 1e9)
        return nanoseconds if self._call_end is None else min(nanoseconds, self._call_end)


def record_step(tracer: Tracer, report: StepReport, kind: str) -> None:
    """Records a span of a step, in a trace of its own, with links to the spans of its requests."""
    contexts = (get_current_span(context).get_span_context() for context in report.contexts)
    span = tracer.start_span(
        names.SPAN_STEP,
        Context(),
        attributes={
            names.STEP_KIND: kind,
            names.NUM_SEQUENCES: len(report.plan.sequences),
            names.NUM_TOKENS: report.plan.num_tokens,
            names.DRAFT_TOKENS: report.plan.num_drafts,
        },
        links=[Link(context) for context in contexts],
        start_time=int(report.start_time_s * 1e9),
    )
    span.end(int((report.start_time_s + report.duration_s) * 1e9))


def step_kind(plan: StepPlan) -> str:
    """Returns 'decode' for one known token of each sequence, 'prefill' for more of each, and otherwise 'mixed'."""
    num_known = plan.num_tokens - plan.num_drafts
    if num_known == len(plan.sequences):
        return "decode"
    return "mixed" if any(step.num_known == 1 for step in plan.sequences) else "prefill"


def operation(request: GenerationRequest) -> str:
    """Returns the name of a request's operation."""
    return "chat" if isinstance(request.prompt, Conversation) else "text_completion"


def request_attributes(request: GenerationRequest, model: str) -> _Attributes:
    """Returns the attributes of a request, leaving out options that are not set."""
    sampling, decoding = request.sampling, request.decoding
    attributes: dict[str, AttributeValue] = {
        names.OPERATION: operation(request),
        names.PROVIDER: "mpt-grpc",
        names.REQUEST_MODEL: model,
        names.REQUEST_ID: request.request_id,
        names.RESPONSE_ID: request.request_id,
        names.REQUEST_TEMPERATURE: sampling.temperature,
        names.REQUEST_TOP_P: sampling.top_p,
        names.REQUEST_TOP_K: sampling.top_k,
    }
    if sampling.num_sequences != 1:
        attributes[names.REQUEST_CHOICE_COUNT] = sampling.num_sequences
    if decoding.frequency_penalty:
        attributes[names.REQUEST_FREQUENCY_PENALTY] = decoding.frequency_penalty
    if decoding.presence_penalty:
        attributes[names.REQUEST_PRESENCE_PENALTY] = decoding.presence_penalty
    if sampling.seed is not None:
        # Attributes are int64; a seed is uint64.
        attributes[names.REQUEST_SEED] = str(sampling.seed)
    if request.stopping.max_new_tokens is not None:
        attributes[names.REQUEST_MAX_TOKENS] = request.stopping.max_new_tokens
    if num_resumed := sum(map(len, request.outputs.values())):
        attributes[names.RESUMED_TOKENS] = num_resumed
    return attributes


def _speculation(timeline: Timeline) -> dict[str, AttributeValue]:
    if not timeline.num_drafts:
        return {}
    return {names.DRAFT_TOKENS: timeline.num_drafts, names.ACCEPTED_TOKENS: timeline.num_accepted}
