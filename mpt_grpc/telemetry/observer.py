"""Turns the reports of the engine, and the ends of calls, into metrics and spans. Belongs to the event loop."""

from __future__ import annotations

from opentelemetry.trace import Tracer

from mpt_grpc.reports import RequestReport, StepReport
from mpt_grpc.telemetry.metrics import Metrics
from mpt_grpc.telemetry.tracing import Timelines, operation, record_phases, record_step, step_kind


class Telemetry:
    """An `Observer` of the engine that records spans, if `tracer` is given, and metrics."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None, trace_interval: int | None = None) -> None:
        """trace_interval: that of `Observer`."""
        self.metrics, self.tracer = metrics, tracer
        self.trace_interval = None if tracer is None else trace_interval
        self._timelines = Timelines()

    def observe_step(self, report: StepReport) -> None:
        kind = step_kind(report.plan)
        self.metrics.record_step(report, kind)
        if self.tracer is not None:
            self._timelines.add(report)
            if report.contexts:
                record_step(self.tracer, report, kind)

    def observe_request(self, report: RequestReport) -> None:
        self.metrics.record_request(report, operation(report.request))
        if self.tracer is not None:
            timeline = self._timelines.take(report.request.request_id)
            if report.context is not None:
                record_phases(self.tracer, report, timeline)
