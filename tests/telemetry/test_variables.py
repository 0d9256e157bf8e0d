"""A standard variable of OpenTelemetry with a value that it does not take ends the start, in one line that names it."""

from __future__ import annotations

import os
import re
import subprocess

import opentelemetry.environment_variables
import opentelemetry.sdk.environment_variables
import pytest
from server_process import CLI

from mpt_grpc.telemetry import variables

IGNORED = (
    r"OTEL_(EXPORTER_OTLP_LOGS|EXPORTER_ZIPKIN|EXPORTER_PROMETHEUS|BLRP|LOGRECORD|LOGS|PYTHON)_\w+"
    "|OTEL_LOG_LEVEL|OTEL_CONFIG_FILE"
)
"""Documented, or of exporters that a server does not have."""
CHECKED_WITH_THE_EXPORTER = r"OTEL_\w+_(ENDPOINT|PROTOCOL|CERTIFICATE|CLIENT_KEY)|OTEL_(TRACES|METRICS)_EXPORTER"
"""Their tests are those of the exporters, in tests/server/test_tracing.py."""
STANDARD = sorted(
    name
    for module in (opentelemetry.environment_variables, opentelemetry.sdk.environment_variables)
    for name in vars(module)
    if name.startswith("OTEL_") and not re.fullmatch(f"{IGNORED}|{CHECKED_WITH_THE_EXPORTER}", name)
)


@pytest.fixture(autouse=True)
def _no_other_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


def shown(name: str, value: str) -> str:
    """How an error shows a value."""
    return "the value" if name.endswith("HEADERS") else repr(value)


@pytest.mark.parametrize("name", [name for name in STANDARD if name != "OTEL_SERVICE_NAME"])
def test_every_variable_that_a_server_reads_is_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "OTEL_TRACES_SAMPLER_ARG":
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv(name, "?")
    found = variables.problem(is_server=True)
    assert found is not None
    assert found.startswith(f"{name}: {shown(name, '?')} is not ")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", ["-1", "1.5", "nan", "many"]),
        ("OTEL_BSP_MAX_QUEUE_SIZE", ["0", "-1", "1e3", "99999999999"]),
        ("OTEL_METRIC_EXPORT_INTERVAL", ["0", "nan", "inf", "1e300", "60s"]),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", ["0", "-1", "nan", "10s"]),
        ("OTEL_TRACES_SAMPLER_ARG", ["-0.1", "1.1", "nan", "half"]),
        ("OTEL_EXPORTER_OTLP_HEADERS", ["token", "a=b,c", "=b"]),
        ("OTEL_RESOURCE_ATTRIBUTES", ["team", "a=b,c"]),
        ("OTEL_PROPAGATORS", ["none", "baggage", "tracecontext,nothing"]),
    ],
)
def test_values_that_opentelemetry_would_warn_of_or_fail_with_later_are_refused(
    name: str, values: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    for value in values:
        monkeypatch.setenv(name, value)
        assert str(variables.problem(is_server=True)).startswith(f"{name}: {shown(name, value)} is not "), value


def test_the_argument_of_a_sampler_that_has_none_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "endpoint=http://localhost:14250")
    assert variables.problem(is_server=True) is None
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_on")
    assert variables.problem(is_server=True) is None


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"])
def test_headers_which_may_be_secret_are_not_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "authorization: my-secret")
    assert "secret" not in str(variables.problem(is_server=True))


def test_valid_values_are_accepted_and_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "0",
        "OTEL_METRIC_EXPORT_INTERVAL": "0.5",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Basic%20abc==, x-tenant=a,",
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "DELTA",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test,team=",
        "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "process,host",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_PROPAGATORS": "baggage, tracecontext",
        "OTEL_BSP_SCHEDULE_DELAY": "",
    }.items():
        monkeypatch.setenv(name, value)
    assert variables.problem(is_server=True) == "OTEL_BSP_SCHEDULE_DELAY: '' is not an integer from 1"
    variables.remove_empty()
    assert variables.problem(is_server=True) is None
    assert "OTEL_BSP_SCHEDULE_DELAY" not in os.environ


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        (("gateway", "--http-port", "0"), "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1"),
        (("top", "--once"), "OTEL_PROPAGATORS", "nothing"),
    ],
)
def test_what_opentelemetry_reads_when_it_is_imported_is_refused_in_one_line(
    command: tuple[str, ...], name: str, value: str
) -> None:
    command = (*CLI, *command, "--target", "localhost:1")
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | {name: value}
    )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"mpt-grpc: {name}: '{value}' is not ")


def test_clients_ignore_what_they_do_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1")
    monkeypatch.setenv("OTEL_PROPAGATORS", "none")
    assert variables.problem(is_server=False) is None
