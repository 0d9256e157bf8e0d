"""The manifests in deploy/kubernetes: valid, and right about the server, without a cluster."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from programs import DEPLOY, output_of, program, program_or_skip

from mpt_grpc.cli import _parser
from mpt_grpc.commands.units import seconds
from mpt_grpc.server import server as server_module
from mpt_grpc.telemetry.exporting import EXPORT_TIMEOUT_S
from mpt_grpc_client.version import __version__

FOLDER = DEPLOY / "kubernetes"
DOWNLOAD = FOLDER / "mpt-7b/download.yaml"


class Manifests:
    """The objects that `kubectl apply -k` would create from a folder."""

    def __init__(self, text: str, given: set[str]) -> None:
        self.objects: list[dict[str, Any]] = list(yaml.safe_load_all(text))
        (self.deployment,) = self.of_kind("Deployment")
        self.template: dict[str, Any] = self.deployment["spec"]["template"]
        self.pod: dict[str, Any] = self.template["spec"]
        (self.container,) = self.pod["containers"]
        self.flags: argparse.Namespace = _parser().parse_args(self.container["args"])
        self.names = {(found["kind"], found["metadata"]["name"]) for found in self.objects}
        self.secrets = given
        """Those that the user creates."""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [found for found in self.objects if found["kind"] == kind]

    def selects_servers(self, labels: dict[str, str]) -> bool:
        return labels.items() <= self.template["metadata"]["labels"].items()

    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}


@pytest.fixture(scope="module", params=["base", "mpt-7b"])
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of all objects of a folder."""
    text = output_of(program_or_skip("kubectl"), "kustomize", FOLDER / request.param)
    path = tmp_path_factory.mktemp("kubernetes") / f"{request.param}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def manifests(rendered: Path) -> Manifests:
    comment = (FOLDER / rendered.stem / "kustomization.yaml").read_text(encoding="utf-8")
    secrets = re.findall(r"^#   kubectl create secret \w+ (\S+)", comment, re.MULTILINE)
    return Manifests(rendered.read_text(encoding="utf-8"), set(secrets))


def test_every_object_is_valid(rendered: Path) -> None:
    output_of(program("kubernetes-validate"), "--strict", rendered, DOWNLOAD)


def test_every_selector_selects_the_servers_and_every_name_exists(manifests: Manifests) -> None:
    assert manifests.selects_servers(manifests.deployment["spec"]["selector"]["matchLabels"])
    for service in manifests.of_kind("Service"):
        assert manifests.selects_servers(service["spec"]["selector"])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= manifests.ports().keys()
    for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        (found,) = manifests.of_kind(kind)
        assert manifests.selects_servers(found["spec"][field]["matchLabels"])
    (spread,) = manifests.pod["topologySpreadConstraints"]
    assert manifests.selects_servers(spread["labelSelector"]["matchLabels"])
    (autoscaler,) = manifests.of_kind("HorizontalPodAutoscaler")
    target = autoscaler["spec"]["scaleTargetRef"]
    assert {
        (target["kind"], target["name"]),
        ("ServiceAccount", manifests.pod["serviceAccountName"]),
    } <= manifests.names
    volumes = {volume["name"]: volume for volume in manifests.pod["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in manifests.container["volumeMounts"]}
    assert manifests.secrets == {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume}
    claims = {
        volume["persistentVolumeClaim"]["claimName"] for volume in volumes.values() if "persistentVolumeClaim" in volume
    }
    assert {("PersistentVolumeClaim", claim) for claim in claims} <= manifests.names


def test_only_callers_reach_the_servers_and_only_prometheus_their_metrics(manifests: Manifests) -> None:
    (policy,) = manifests.of_kind("NetworkPolicy")
    allowed = {}
    for rule in policy["spec"]["ingress"]:
        (caller,) = rule["from"]
        assert not manifests.selects_servers(caller["podSelector"]["matchLabels"])
        allowed |= {port["port"]: caller["podSelector"]["matchLabels"] for port in rule["ports"]}
    callers, prometheus = {"mpt-grpc-client": "true"}, {"app.kubernetes.io/name": "prometheus"}
    assert allowed == {"grpc": callers, "http": callers, "metrics": prometheus}
    assert allowed.keys() == manifests.ports().keys()
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["spec"]["egress"] == []


def test_the_flags_exist_and_name_the_ports_and_the_files_of_the_pod(manifests: Manifests) -> None:
    flags = manifests.flags
    assert manifests.ports() == {"grpc": flags.grpc_port, "http": flags.http_port, "metrics": flags.metrics_port}
    mounts = [mount["mountPath"] for mount in manifests.container["volumeMounts"]]
    files = [argument.partition("=")[2] for argument in manifests.container["args"] if "=/" in argument]
    assert all(any(file.startswith(f"{mount}/") for mount in mounts) for file in files)
    assert (flags.tls_cert is None) == (flags.tokens_file is None) == (not manifests.secrets)
    annotations = manifests.template["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(flags.metrics_port)
    assert annotations.get("prometheus.io/scheme", "http") == ("https" if flags.tls_cert else "http")


def test_the_probes_ask_for_what_the_server_has(manifests: Manifests) -> None:
    startup, live, ready = (manifests.container[f"{name}Probe"] for name in ("startup", "liveness", "readiness"))
    if manifests.flags.tls_cert is None:
        services = [probe["grpc"].get("service", "") for probe in (startup, live, ready)]
        assert services == [server_module.LIVE, server_module.LIVE, ""]
        assert {probe["grpc"]["port"] for probe in (startup, live, ready)} == {manifests.flags.grpc_port}
    else:
        https = {"path": "/ready", "port": "http", "scheme": "HTTPS"}
        assert [probe["httpGet"] for probe in (startup, live, ready)] == [https] * 3


def test_a_pod_has_the_time_to_drain(manifests: Manifests) -> None:
    pause = manifests.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    ready = manifests.container["readinessProbe"]
    assert pause >= ready["periodSeconds"]  # for DNS and proxies to hear of it
    after = server_module._STOP_TIMEOUT_S + EXPORT_TIMEOUT_S
    assert manifests.pod["terminationGracePeriodSeconds"] >= pause + manifests.flags.grace + after
    assert seconds("30s") <= manifests.flags.grace


def pods(manifests: Manifests) -> Iterator[dict[str, Any]]:
    yield manifests.pod
    yield yaml.safe_load(DOWNLOAD.read_text(encoding="utf-8"))["spec"]["template"]["spec"]


def test_containers_are_restricted_and_have_limits(manifests: Manifests) -> None:
    for pod in pods(manifests):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert container["resources"]["limits"]["memory"]
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert re.fullmatch(rf"mpt-grpc:{re.escape(__version__)}(-cuda)?", container["image"])


def test_the_autoscaler_reads_a_metric_that_the_server_has(manifests: Manifests, server: Any) -> None:
    (autoscaler,) = manifests.of_kind("HorizontalPodAutoscaler")
    (metric,) = autoscaler["spec"]["metrics"]
    (rule,) = yaml.safe_load((FOLDER / "adapter.yaml").read_text(encoding="utf-8"))["rules"]
    name = metric["pods"]["metric"]["name"]
    assert rule["seriesQuery"].startswith(f"{name}{{")
    with urlopen(server.openai_url.replace("/v1", "/metrics"), timeout=10) as page:
        assert f"\n{name} 0.0" in page.read().decode()
