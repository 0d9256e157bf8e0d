"""Reports of the engine's work, as values, and the interface of their receivers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from opentelemetry.context import Context

from mpt_grpc.request import GenerationRequest
from mpt_grpc.results import FinishReason, RequestStats
from mpt_grpc.step import StepPlan


class StepReport(NamedTuple):
    """One step of the engine."""

    plan: StepPlan
    num_new_tokens: Mapping[int, int]
    """The numbers of tokens that outputs got, by sequence ID."""
    start_time_s: float
    """In seconds since the epoch."""
    duration_s: float
    ended: frozenset[str]
    """The IDs of those of its requests that ended before it was complete, and have been reported."""
    contexts: tuple[Context, ...]
    """The trace contexts of its requests, if the step is to be traced."""


@dataclass(frozen=True)
class RequestReport:
    """One request that has ended."""

    request: GenerationRequest
    stats: RequestStats
    finish_reasons: tuple[FinishReason, ...]
    """Why its outputs ended, without those that ended with an error."""
    error: Exception | None
    context: Context | None
    """The trace context that it was submitted with."""


class Observer(Protocol):
    """Receives the reports of an engine, in order, where its events are received."""

    trace_interval: int | None
    """Each step whose number is divisible by this is to be traced; None traces no steps."""

    def observe_step(self, report: StepReport) -> None: ...

    def observe_request(self, report: RequestReport) -> None: ...
