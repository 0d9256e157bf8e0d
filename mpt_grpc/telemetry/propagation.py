"""The trace of a caller, as its W3C headers name it."""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_PROPAGATOR = TraceContextTextMapPropagator()
_PARENT, _STATE = "traceparent", "tracestate"
_MAX_LENGTH = 512


def callers_context(headers: Iterable[tuple[str, str | bytes]]) -> Context:
    """Returns the context in the headers or the metadata of a caller; an empty one if there is no valid one.

    As in the standard, several `tracestate` are one list, and several `traceparent` are not valid. What is longer than
    the standard asks for is left out, as every span would carry it.
    """
    found: dict[str, list[str]] = {_PARENT: [], _STATE: []}
    for name, value in headers:
        if name in found and isinstance(value, str):
            found[name].append(value)
    if len(found[_PARENT]) != 1:
        return Context()
    carrier = {name: values for name, values in found.items() if values and sum(map(len, values)) <= _MAX_LENGTH}
    return _PROPAGATOR.extract(carrier, Context())
