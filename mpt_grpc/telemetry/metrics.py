"""The metrics: what is measured, in which units and buckets. docs/telemetry.md lists them.

Values are recorded on the event loop, once for each request, call or step. Gauges are read when metrics are collected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.util.types import AttributeValue

from mpt_grpc.reports import RequestReport, StepReport
from mpt_grpc.results import FinishReason
from mpt_grpc.telemetry import names

MAX_CALLERS = 100
"""The number of callers that are counted by name; further ones are counted together."""
ANONYMOUS, OTHERS = "(anonymous)", "(others)"
"""How callers without a name, and those beyond `MAX_CALLERS`, are counted; no name contains parentheses."""
_CALL_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_REQUEST_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_OUTPUT_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_SEQUENCE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_INPUT, _OUTPUT = {names.TOKEN_TYPE: names.TOKEN_TYPE_INPUT}, {names.TOKEN_TYPE: names.TOKEN_TYPE_OUTPUT}


class Metrics:
    """All instruments. Their names, units and descriptions are what Prometheus shows."""

    def __init__(self, meter: Meter, model: str, failures: Iterable[str] = ()) -> None:
        """failures: the reasons of failures that are known.

        Whatever is known is counted from zero: for Prometheus, a count whose first value is 1 has not increased.
        """

        def histogram(name: str, unit: str, what: str, buckets: Iterable[float]) -> Callable[..., None]:
            return meter.create_histogram(name, unit, what, explicit_bucket_boundaries_advisory=list(buckets)).record

        def counter(name: str, unit: str, what: str) -> Callable[..., None]:
            return meter.create_counter(name, unit, what).add

        self._meter = meter
        self._model = {names.PROVIDER: "mpt-grpc", names.REQUEST_MODEL: model}
        self._callers: set[str] = set()
        self._call_duration = histogram(names.RPC_DURATION, "s", "Duration of gRPC calls", _CALL_BUCKETS)
        self._duration = histogram(
            names.REQUEST_DURATION, "s", "Duration of generations, until the last output token", _REQUEST_BUCKETS
        )
        self._first_token = histogram(
            names.TIME_TO_FIRST_TOKEN, "s", "Time from a request's arrival to its first token", _FIRST_TOKEN_BUCKETS
        )
        self._per_token = histogram(
            names.TIME_PER_OUTPUT_TOKEN, "s", "Time per output token after the first", _OUTPUT_TOKEN_BUCKETS
        )
        self._queue = histogram(names.QUEUE_DURATION, "s", "Time until a request first runs", _FIRST_TOKEN_BUCKETS)
        self._prefill = histogram(
            names.PREFILL_DURATION, "s", "Time from a request's first step to its first token", _FIRST_TOKEN_BUCKETS
        )
        self._decode = histogram(
            names.DECODE_DURATION, "s", "Time from a request's first token to its end", _REQUEST_BUCKETS
        )
        self._request_tokens = histogram(names.REQUEST_TOKENS, "{token}", "Tokens of a request", _TOKEN_BUCKETS)
        self._ended = counter(names.REQUESTS_ENDED, "{request}", "Outputs that have ended, by their finish reason")
        for finish_reason in FinishReason:
            self._ended(0, {names.FINISH_REASON: finish_reason.name.lower()})
        self._failed = counter(names.REQUESTS_FAILED, "{request}", "Requests refused or failed, by the reason")
        for reason in failures:
            self._failed(0, {names.ERROR_TYPE: reason})
        self._prompt_tokens = counter(names.PROMPT_TOKENS, "{token}", "Tokens of prompts")
        self._cached_tokens = counter(
            names.PROMPT_CACHED_TOKENS, "{token}", "Tokens of prompts that were in the prefix cache"
        )
        self._prompt_tokens(0)
        self._cached_tokens(0)
        self._caller_requests = counter(names.CALLER_REQUESTS, "{request}", "Requests that have ended, by caller")
        self._caller_tokens = counter(names.CALLER_TOKENS, "{token}", "Tokens of ended requests, by caller")
        self._step_duration = histogram(names.STEP_DURATION, "s", "Duration of steps, by kind", _STEP_BUCKETS)
        self._step_sequences = histogram(
            names.STEP_SEQUENCES, "{sequence}", "Sequences in a step: the batch size", _SEQUENCE_BUCKETS
        )
        self.record_lag = histogram(names.LOOP_LAG, "s", "How late the event loop runs a timer", _LAG_BUCKETS)

    def record_call(
        self,
        method: str,
        code: str,
        reason: str | None,
        duration_s: float,
        *,
        is_generation: bool,
        operation: str | None,
        finish_reasons: Iterable[FinishReason],
        context: Context | None,
    ) -> None:
        """Records the end of a call.

        reason: that of an error. operation: what a generation that reached the engine does. finish_reasons: those of
        its outputs, as the caller got them, which the text may decide. context: that of its span.
        """
        error = {} if reason is None else {names.ERROR_TYPE: reason}
        attributes = {names.RPC_SYSTEM: "grpc", names.RPC_METHOD: method, names.RPC_STATUS_CODE: code, **error}
        self._call_duration(duration_s, attributes, context)
        if operation is not None:
            self._duration(duration_s, {**self._model, names.OPERATION: operation, **error}, context)
        for finish_reason, count in Counter(finish_reasons).items():
            self._ended(count, {names.FINISH_REASON: finish_reason.name.lower()})
        if is_generation and reason is not None:
            self._failed(1, error)

    def record_request(self, report: RequestReport, operation: str) -> None:
        """Records the end of a request that the engine had accepted."""
        stats, context = report.stats, report.context
        attributes = {**self._model, names.OPERATION: operation}
        self._prompt_tokens(stats.num_prompt_tokens)
        self._cached_tokens(stats.num_cached_tokens)
        caller = {names.CALLER: self._caller(report.request.caller.name)}
        self._caller_requests(1, caller)
        for num_tokens, kind in ((stats.num_prompt_tokens, _INPUT), (stats.num_output_tokens, _OUTPUT)):
            self._caller_tokens(num_tokens, {**caller, **kind})
            self._request_tokens(num_tokens, kind, context)
        self._queue((stats.scheduled_time_s or stats.end_time_s) - stats.arrival_time_s, None, context)
        if stats.scheduled_time_s is None or stats.first_token_time_s is None or report.error is not None:
            return
        self._prefill(stats.first_token_time_s - stats.scheduled_time_s, None, context)
        self._first_token(stats.first_token_time_s - stats.arrival_time_s, attributes, context)
        decode_s = stats.end_time_s - stats.first_token_time_s
        self._decode(decode_s, None, context)
        num_outputs = len(report.request.outputs)
        if stats.num_output_tokens > num_outputs:
            self._per_token(decode_s * num_outputs / (stats.num_output_tokens - num_outputs), attributes, context)

    def record_step(self, report: StepReport, kind: str) -> None:
        self._step_duration(report.duration_s, {names.STEP_KIND: kind})
        self._step_sequences(len(report.plan.sequences))

    def observe(
        self, name: str, unit: str, what: str, read: Callable[[], float], *, attributes: Mapping[str, str] | None = None
    ) -> None:
        """Adds a gauge, which `read` returns whenever metrics are collected, in any thread."""
        self._meter.create_observable_gauge(name, [_callback(read, attributes)], unit, what)

    def observe_count(self, name: str, unit: str, what: str, read: Callable[[], int]) -> None:
        """Adds a counter, which `read` returns whenever metrics are collected, in any thread."""
        self._meter.create_observable_counter(name, [_callback(read, None)], unit, what)

    def _caller(self, name: str) -> str:
        if name not in self._callers and len(self._callers) < MAX_CALLERS:
            self._callers.add(name)
        return (name or ANONYMOUS) if name in self._callers else OTHERS


class HttpMetrics:
    """The instruments of HTTP requests."""

    def __init__(self, meter: Meter) -> None:
        self._active = meter.create_up_down_counter(names.HTTP_ACTIVE, "{request}", "HTTP requests in progress")
        self._duration = meter.create_histogram(
            names.HTTP_DURATION,
            "s",
            "Duration of HTTP requests, until the end of the response",
            explicit_bucket_boundaries_advisory=list(_CALL_BUCKETS),
        )

    def begin(self, method: str, scheme: str) -> None:
        """Records the arrival of a request."""
        self._active.add(1, {names.HTTP_METHOD: method, names.URL_SCHEME: scheme})

    def end(self, method: str, scheme: str, route: str | None, status: int | None, duration_s: float) -> None:
        """Records the end of a request. Both `route` and `status` are None if it has none."""
        self._active.add(-1, {names.HTTP_METHOD: method, names.URL_SCHEME: scheme})
        attributes: dict[str, str | int] = {names.HTTP_METHOD: method, names.URL_SCHEME: scheme}
        if route is not None:
            attributes[names.HTTP_ROUTE] = route
        if status is not None:
            attributes[names.HTTP_STATUS_CODE] = status
            if status >= 500:
                attributes[names.ERROR_TYPE] = str(status)
        self._duration.record(duration_s, attributes)


def _callback(
    read: Callable[[], float], attributes: Mapping[str, AttributeValue] | None
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _: (Observation(read(), attributes),)
