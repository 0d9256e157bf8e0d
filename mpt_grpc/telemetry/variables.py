"""The values that OpenTelemetry's standard variables take.

They are checked before OpenTelemetry is imported: it reads some of them then, and goes on without those that it cannot
read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.metadata import entry_points

_Rule = tuple[Callable[[str], bool], str]
"""Whether a value is valid, and what a valid one is."""


def remove_empty() -> None:
    """Removes empty variables, which the standard treats as unset, and OpenTelemetry does not always."""
    for name in _names():
        if not os.environ[name]:
            del os.environ[name]


def problem(*, is_server: bool) -> str | None:
    """Returns the error of the first variable that is not valid, or None.

    Clients read only OTEL_PROPAGATORS.
    """
    rules = _OF_SERVERS if is_server else _OF_CLIENTS
    for name in _names():
        for pattern, (is_valid, what) in rules.items():
            if re.fullmatch(pattern, name) and not is_valid(os.environ[name]):
                shown = "the value" if name.endswith("HEADERS") else repr(os.environ[name])  # which may be secret
                return f"{name}: {shown} is not {what}"
    return None


def _names() -> list[str]:
    return sorted(name for name in os.environ if name.startswith("OTEL_"))


def _integer(minimum: int) -> _Rule:
    return lambda value: value.isdecimal() and minimum <= int(value) < _TOO_LARGE, f"an integer from {minimum}"


def _number(is_valid: Callable[[float], bool], what: str) -> _Rule:
    def check(value: str) -> bool:
        try:
            return is_valid(float(value))
        except ValueError:
            return False

    return check, what


def _one_of(*values: str) -> _Rule:
    return lambda value: value.lower() in values, " or ".join((", ".join(values[:-1]), values[-1]))


def _ratio() -> _Rule:
    """Returns the rule for the argument of the sampler, which other samplers than those of a ratio ignore."""
    is_ratio, what = _number(lambda value: 0 <= value <= 1, "a number from 0 to 1")

    def check(value: str) -> bool:
        return not os.environ.get("OTEL_TRACES_SAMPLER", "").lower().endswith("traceidratio") or is_ratio(value)

    return check, what


def _installed(group: str, *others: str, required: str = "") -> _Rule:
    """Returns the rule for a list of names of plugins."""

    def check(value: str) -> bool:
        names = {name.strip() for name in value.split(",")} - {""}
        known = {point.name for point in entry_points(group=group)}
        return names <= known | set(others) and (not required or required in names)

    return check, f"a list of {f'{required} and other ' if required else ''}names that are installed"


_TOO_LARGE = 2**31
"""As a time in milliseconds, it would be 24 days."""
_PAIRS: _Rule = (
    lambda value: all(re.fullmatch(r"[^=\s]+\s*=.*", pair.strip()) for pair in value.split(",") if pair.strip()),
    "a list such as name=value,other=value",
)
_POSITIVE = _number(lambda value: 0 < value < _TOO_LARGE, "a number above 0")
_OTLP = r"OTEL_EXPORTER_OTLP_((TRACES|METRICS)_)?"
_OF_SERVERS: dict[str, _Rule] = {
    r"OTEL_((SPAN|EVENT|LINK)_)?ATTRIBUTE_(COUNT|VALUE_LENGTH)_LIMIT|OTEL_SPAN_(EVENT|LINK)_COUNT_LIMIT": _integer(0),
    r"OTEL_BSP_\w+": _integer(1),
    r"OTEL_METRIC_EXPORT_(INTERVAL|TIMEOUT)": _POSITIVE,
    _OTLP + "TIMEOUT": _POSITIVE,
    _OTLP + "COMPRESSION": _one_of("none", "gzip", "deflate"),
    _OTLP + "INSECURE": _one_of("true", "false"),
    _OTLP + "HEADERS": _PAIRS,
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": _one_of("cumulative", "delta", "lowmemory"),
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": _one_of(
        "explicit_bucket_histogram", "base2_exponential_bucket_histogram"
    ),
    "OTEL_METRICS_EXEMPLAR_FILTER": _one_of("always_on", "always_off", "trace_based"),
    "OTEL_TRACES_SAMPLER": _one_of(
        *(f"{parent}{name}" for parent in ("", "parentbased_") for name in ("always_on", "always_off", "traceidratio"))
    ),
    "OTEL_TRACES_SAMPLER_ARG": _ratio(),
    "OTEL_RESOURCE_ATTRIBUTES": _PAIRS,
    "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": _installed("opentelemetry_resource_detector", "*"),
    "OTEL_PROPAGATORS": _installed("opentelemetry_propagator", required="tracecontext"),
    "OTEL_SDK_DISABLED": _one_of("true", "false"),
}
_OF_CLIENTS: dict[str, _Rule] = {"OTEL_PROPAGATORS": _installed("opentelemetry_propagator", "none")}
