"""Turns the reports of the engine into metrics and spans. Belongs to the event loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry.trace import Tracer

from mpt_grpc.reports import RequestReport, StepReport
from mpt_grpc.telemetry.metrics import Metrics
from mpt_grpc.telemetry.tracing import Timelines, operation, record_phases, record_step, step_kind

_log = logging.getLogger(__name__)


class Telemetry:
    """An `Observer` of the engine that records metrics, and spans if `tracer` is given."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None, trace_interval: int | None) -> None:
        """trace_interval: that of `Observer`."""
        self.metrics, self.tracer = metrics, tracer
        self.trace_interval = None if tracer is None else trace_interval
        self._timelines = Timelines()

    def observe_step(self, report: StepReport) -> None:
        with _only_logged():
            kind = step_kind(report.plan)
            self.metrics.record_step(report, kind)
            if self.tracer is not None:
                self._timelines.add(report)
                if report.contexts:
                    record_step(self.tracer, report, kind)

    def observe_request(self, report: RequestReport) -> None:
        with _only_logged():
            self.metrics.record_request(report, operation(report.request))
            if self.tracer is not None:
                timeline = self._timelines.take(report.request.request_id)
                if report.context is not None:
                    record_phases(self.tracer, report, timeline)


@contextmanager
def _only_logged() -> Iterator[None]:
    """Logs an exception instead of raising it: the tokens of all requests are delivered behind the reports."""
    try:
        yield
    except Exception:
        _log.exception("a report was not recorded")
