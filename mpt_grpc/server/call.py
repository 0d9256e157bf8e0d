"""The call being served: who calls, and what its end leaves in the log, the metrics and the trace."""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import Message
from opentelemetry.trace import Span, StatusCode, format_trace_id, set_span_in_context

from mpt_grpc.caller import Caller
from mpt_grpc.errors import MptServerError
from mpt_grpc.results import FinishReason
from mpt_grpc.server import status
from mpt_grpc.telemetry import names
from mpt_grpc.telemetry.metrics import Metrics

_log = logging.getLogger("mpt_grpc.access")
_POLLED = ("GetEngineState", "GetModelInfo", "GetServerInfo")
_GENERATIONS = ("Generate", "StreamGenerate")
_SERVER_FAILURES = frozenset(
    (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)
"""The codes that OpenTelemetry's conventions count as errors of a server; others are those of its callers."""
_MAX_LOGGED_CHARACTERS = 300
_DEADLINE_TOLERANCE, _DEADLINE_TOLERANCE_S = 0.015, 0.010
"""How much earlier than its deadline a call may be cancelled and still count as having passed it, by the clock of the
caller: gRPC rounds the time that it sends up by up to a hundredth."""


class _Outcome(NamedTuple):
    """How a call has ended."""

    code: grpc.StatusCode
    reason: str | None
    """Why, if it was not served."""
    duration_s: float


@dataclass
class Call:
    """The call being served."""

    method: str
    """The full name of its method."""
    peer: str
    span: Span | None
    """None unless the server traces, and the call is sampled."""
    caller: Caller
    timeout_s: float | None
    """The time to its deadline when it began, or None without one."""
    num_bytes: int = 0
    """The size of its message."""
    num_logprobs: int = 0
    """The number of log probabilities in its latest response."""
    operation: str | None = None
    """What a generation does, by its name in GenAI's conventions; None until its message has been read."""
    logged: dict[str, Any] = field(default_factory=dict)
    """What its line in the log contains in addition to the method, the status and the duration."""
    error_details: list[Message] = field(default_factory=list)
    """What the status of an error carries in addition to the details of the error itself."""
    num_outputs: int = 0
    """The number of outputs of a generation that the engine has accepted."""
    finish_reasons: list[FinishReason] = field(default_factory=list)
    """Why those outputs ended whose ends the caller has got."""
    failure: MptServerError | None = None
    """Why the server cancels its handler."""
    _start_s: float = field(default_factory=time.monotonic)
    _outcome: _Outcome | None = None

    def __post_init__(self) -> None:
        if self.caller.name:
            self.logged["caller"] = self.caller.name
        if self.span is not None:
            self.logged["trace_id"] = format_trace_id(self.span.get_span_context().trace_id)

    def end(self) -> None:
        """Ends a call that has succeeded; `record` is to follow."""
        self._end(grpc.StatusCode.OK, None)

    def cancel(self) -> None:
        """Ends a call that was cancelled, by its caller or by the server, or whose deadline has passed."""
        self.finish_reasons += [FinishReason.CANCELLED] * (self.num_outputs - len(self.finish_reasons))
        if self.failure is not None:
            self.fail(self.failure)
            return
        code, reason = grpc.StatusCode.CANCELLED, None
        if self.timeout_s is not None and self._age_s >= self.timeout_s - _tolerance_s(self.timeout_s):
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            reason = code.name
            self._set_error(code, reason, "the deadline has passed")
        self._end(code, reason)

    def fail(self, error: MptServerError) -> None:
        """Ends a call that has failed."""
        code = status.status_code(error)
        self._set_error(code, error.reason, error.logged)
        self._end(code, error.reason)

    def record(self, metrics: Metrics) -> None:
        """Logs and counts the call, which has ended. Takes a tenth of a millisecond."""
        assert self._outcome is not None
        code, reason, duration_s = self._outcome
        name = self.method.rpartition("/")[2]
        self._log(name, code, duration_s)
        metrics.record_call(
            self.method,
            code.name,
            reason,
            duration_s,
            is_generation=name in _GENERATIONS,
            operation=self.operation,
            finish_reasons=self.finish_reasons,
            context=None if self.span is None else set_span_in_context(self.span),
        )

    @property
    def _age_s(self) -> float:
        return time.monotonic() - self._start_s

    def _set_error(self, code: grpc.StatusCode, reason: str, description: str) -> None:
        self.logged |= {"reason": reason, "error": description}
        if self.span is not None:
            self.span.set_attribute(names.ERROR_TYPE, reason)
            if code in _SERVER_FAILURES:
                self.span.set_status(StatusCode.ERROR, description)

    def _end(self, code: grpc.StatusCode, reason: str | None) -> None:
        self._outcome = _Outcome(code, reason, self._age_s)
        finishes = [finish_reason.name.lower() for finish_reason in self.finish_reasons]
        if finishes:
            self.logged["finish"] = ",".join(finishes)
        if self.span is not None:
            if finishes:
                self.span.set_attribute(names.RESPONSE_FINISH_REASONS, finishes)
            self.span.set_attribute(names.RPC_STATUS_CODE, code.name)
            self.span.end()

    def _log(self, name: str, code: grpc.StatusCode, duration_s: float) -> None:
        level = logging.DEBUG if name in _POLLED and code is grpc.StatusCode.OK else logging.INFO
        if not _log.isEnabledFor(level):
            return
        # Copied first: the thread that translates the message of a cancelled call may be adding its ID.
        fields = {key: _shortened(value) for key, value in self.logged.copy().items()}
        # Text of callers is quoted, so that it cannot forge a line of the log.
        details = "".join(f" {key}={value!r}" for key, value in fields.items())
        summary = f"{name} {code.name}"
        named = {"method": name, "status": code.name, "duration_s": round(duration_s, 6), "peer": self.peer, **fields}
        extra = {"summary": summary, "fields": named}
        _log.log(level, "%s %.3f s peer=%s%s", summary, duration_s, self.peer, details, extra=extra)


_call: ContextVar[Call] = ContextVar("call")


def begin_call(call: Call) -> None:
    """Makes a call the current one of this task. Each call runs in a task of its own, so this need not be undone."""
    _call.set(call)


def current_call() -> Call:
    """Returns the call that this coroutine serves."""
    return _call.get()


def _tolerance_s(timeout_s: float) -> float:
    return max(_DEADLINE_TOLERANCE_S, _DEADLINE_TOLERANCE * timeout_s)


def _shortened(value: Any) -> Any:
    return value[:_MAX_LOGGED_CHARACTERS] if isinstance(value, str) else value
