"""The dashboard and the alerts, in a Prometheus that scrapes a server under load; and the files of Compose."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
from asyncio.subprocess import PIPE, create_subprocess_exec
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import grpc
import pytest
import yaml
from conftest import demo_settings
from programs import DEPLOY, output_of, program

from mpt_grpc.server.server import running_server
from mpt_grpc.settings import TelemetrySettings
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.proto.v1.text_generation_pb2_grpc import TextGenerationServiceStub

COMPOSE = DEPLOY / "compose.yaml"
ALERTS = DEPLOY / "prometheus/alerts.yaml"
TEXT = "The cat sat on the mat. The dog sat on the mat. The cat sat on the mat. The dog sat on"

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None and "CI" not in os.environ, reason="needs prometheus: apt-get install prometheus"
)


def dashboard_queries() -> Iterator[str]:
    for panel in json.loads((DEPLOY / "grafana/dashboard.json").read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".+")


def alert_queries() -> Iterator[str]:
    """Yields the values that the alerts compare with their thresholds."""
    for rule in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]:
        for comparison in rule["expr"].split(" and "):
            value, operator, _ = re.split(r" (==|>) (?=[\d.]+$)", comparison)
            assert operator
            yield value


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def query(self, expression: str) -> list[float]:
        """Returns the values of an expression at this moment, except those that are not numbers."""
        url = f"{self._url}/api/v1/query?query={quote(expression)}"
        response = await asyncio.to_thread(lambda: json.load(urlopen(url, timeout=10)))
        values = [float(result["value"][1]) for result in response["data"]["result"]]
        return [value for value in values if not math.isnan(value)]


async def _send_load(stub: Any) -> None:
    """Sends requests that repeat their prompts and together exceed the cache, and one that is refused."""
    stopping = pb.StoppingCriteria(max_new_tokens=60, ignore_eos=True)
    calls = [stub.Generate(pb.GenerateRequest(text=f"{n} {TEXT}", stopping=stopping)) for n in range(4)]
    calls.append(stub.Generate(pb.GenerateRequest(text=TEXT, sampling=pb.SamplingParameters(temperature=-1))))
    for call in calls:
        with suppress(grpc.aio.AioRpcError):
            await call


@pytest.fixture(scope="module")
async def prometheus(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prometheus]:
    """A Prometheus that has scraped a server under load several times. The collector of the server is down."""
    settings = demo_settings(16, max_running_requests=4, max_step_tokens=32, speculate="ngram")
    folder = tmp_path_factory.mktemp("prometheus")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
        environment.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
        environment.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
        async with (
            running_server(replace(settings, telemetry=TelemetrySettings(metrics_port=0))) as server,
            grpc.aio.insecure_channel(server.target) as channel,
        ):
            config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text(encoding="utf-8"))
            config["global"]["scrape_interval"] = config["global"]["scrape_timeout"] = "200ms"
            config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{server.metrics_port}"]
            config["rule_files"] = [str(ALERTS)]
            (folder / "prometheus.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
            flags = (f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data")
            process = await create_subprocess_exec(
                "prometheus", *flags, "--web.listen-address=127.0.0.1:0", stderr=PIPE
            )
            try:
                assert process.stderr is not None
                start = (await process.stderr.readuntil(b"Server is ready to receive web requests")).decode()
                address = re.findall(r'"Listening on" address=(\S+)', start)[0]
                reading = asyncio.create_task(process.stderr.read())
                running = Prometheus(f"http://{address}")
                scrapes = "count_over_time(mpt_caller_requests_total[1m])"
                while max(await running.query(scrapes), default=0) < 6:
                    await _send_load(TextGenerationServiceStub(channel))
                yield running
            finally:
                process.terminate()
                await process.wait()
                await reading


@needs_prometheus
async def test_every_query_of_the_dashboard_returns_data(prometheus: Prometheus) -> None:
    queries = list(dashboard_queries())
    assert len(queries) > 30
    assert [query for query in queries if not await prometheus.query(query)] == []


@needs_prometheus
async def test_every_value_that_an_alert_compares_exists(prometheus: Prometheus) -> None:
    assert [query for query in alert_queries() if not await prometheus.query(query)] == []


@needs_prometheus
async def test_alerts_fire_for_a_server_in_trouble_and_for_no_other() -> None:
    tests = str(Path(__file__).with_name("alerts.yaml"))
    process = await create_subprocess_exec("promtool", "test", "rules", tests, stdout=PIPE, stderr=PIPE)
    output = b"".join(await process.communicate())
    assert process.returncode == 0, output


def test_the_compose_file_is_valid() -> None:
    output_of(program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_the_files_and_services_that_compose_names_exist() -> None:
    services = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= services.keys()
        for volume in service.get("volumes", ()):
            assert (DEPLOY / volume.split(":")[0]).exists()
    hosts = set(re.findall(r"(?:http://|: |\[\")([a-z]+):\d{4}", "".join(_settings())))
    assert hosts <= services.keys()
    assert hosts >= {"server", "jaeger", "prometheus"}


def _settings() -> Iterator[str]:
    for path in ("collector.yaml", "prometheus/prometheus.yaml", "grafana/provisioning/datasources/datasources.yaml"):
        yield (DEPLOY / path).read_text(encoding="utf-8")


def test_the_command_of_compose_has_only_flags_that_exist() -> None:
    from mpt_grpc.cli import _parser

    services = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    parsed = _parser().parse_args(services["server"]["command"])
    assert parsed.metrics_port == 9464
