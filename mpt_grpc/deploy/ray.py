"""Ray Serve places, scales and restarts servers; clients call these directly, by the list of their targets.

Only requests for the list go through Serve. Streams pass through no proxy, so that all that a server promises holds,
and a client continues those of a replica that is gone on another one.
"""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingContext
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from mpt_grpc.commands.server_options import settings
from mpt_grpc.deploy.child import parse
from mpt_grpc.errors import SettingsError
from mpt_grpc.settings import ALL_ADDRESSES
from mpt_grpc_client import InvalidRequestError, Message, routing
from mpt_grpc_client.request import build_request

_STOP_MARGIN_S = 10.0
"""How much longer than its grace period a server may take to stop."""
_MAX_SILENCE_S = 10.0
"""After how long without a report a server counts as hung."""
_LIST_TIMEOUT_S = 5.0
_MAX_PARSED_BYTES = 1 << 20
"""Larger bodies are not parsed here, since this would delay other requests."""


@dataclass(frozen=True)
class Endpoint:
    """Where a replica's server listens."""

    target: str
    """For gRPC clients."""
    openai_url: str | None
    """The origin of the OpenAI-compatible API; None with `--no-http`."""
    num_requests: int = 0
    """The requests in progress at its last report."""


class Server:
    """A replica: it runs one server in a process of its own, reports its health and load, and finally drains it."""

    def __init__(self, flags: str) -> None:
        """`flags`: those of `mpt-grpc serve`. Raises RuntimeError with the server's reason if the start fails."""
        # Free ports, since replicas may share a machine.
        defaults = ("--host", get_node_ip_address(), "--grpc-port", "0", "--http-port", "0")
        command = (sys.executable, "-m", "mpt_grpc.deploy.child", *defaults, *shlex.split(flags))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started = self._read()
        if "target" not in started:
            raise RuntimeError(f"the server did not start: {started.get('error', 'its log has the reason')}")
        self._endpoint = Endpoint(**started)
        self._is_live, self._num_requests, self._heard_s = True, 0, time.monotonic()
        threading.Thread(target=self._listen, daemon=True).start()

    async def endpoint(self) -> Endpoint:
        """Returns the addresses of the server, and its load."""
        return replace(self._endpoint, num_requests=self._num_requests)

    async def check_health(self) -> None:
        """Raises RuntimeError if the server has ended, reports that it is not live, or reports nothing."""
        if self._process.poll() is not None:
            raise RuntimeError(f"the server has ended with status {self._process.returncode}; its log has the reason")
        if not self._is_live or time.monotonic() - self._heard_s > _MAX_SILENCE_S:
            raise RuntimeError("the server is stalled")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the requests in flight, for `by_requests`."""
        return {"requests": self._num_requests}

    def __del__(self) -> None:
        """Drains the server: its health turns to NOT_SERVING, and streams have the grace period to finish."""
        self._process.terminate()
        self._process.wait()

    def _listen(self) -> None:
        while report := self._read():
            if "error" not in report:
                self._is_live, self._num_requests = report["is_live"], report["num_requests"]
                self._heard_s = time.monotonic()

    def _read(self) -> dict[str, Any]:
        """Returns the next report; empty when the server has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {}


class Targets:
    """The HTTP route of the application: `/` lists the targets, and `/v1` redirects to a server, by prompt."""

    def __init__(self, servers: DeploymentHandle[Any]) -> None:
        self._servers, self._turn = servers, itertools.count()

    async def endpoints(self) -> list[Endpoint]:
        """Returns the endpoints of all replicas that run; those that drain are not among them."""
        try:
            replies = await self._servers.broadcast("endpoint").results_async(
                timeout_s=_LIST_TIMEOUT_S, return_exceptions=True
            )
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return sorted((reply for reply in replies if isinstance(reply, Endpoint)), key=lambda reply: reply.target)

    async def __call__(self, request: Request) -> Response:
        endpoints = await self.endpoints()
        path, query = request.url.path, f"?{request.url.query}" if request.url.query else ""
        over_http = [endpoint for endpoint in endpoints if endpoint.openai_url]
        if path == "/" and endpoints:
            return PlainTextResponse(",".join(endpoint.target for endpoint in endpoints))
        if path.startswith("/v1/") and over_http:
            chosen = self._chosen(over_http, beginning_of(await request.body()))
            return RedirectResponse(f"{chosen.openai_url}{path}{query}", status_code=307)
        if endpoints:
            return PlainTextResponse("there is nothing at this path; / lists the targets", status_code=404)
        return PlainTextResponse("no server is running", status_code=503, headers={"retry-after": "1"})

    def _chosen(self, endpoints: Sequence[Endpoint], beginning: bytes) -> Endpoint:
        # Loads are up to a second old. By them, all requests of that second would go to the least busy server.
        loads = [endpoint.num_requests if beginning else 0 for endpoint in endpoints]
        targets = [endpoint.target for endpoint in endpoints]
        return endpoints[routing.order(beginning, targets, loads, next(self._turn) % len(endpoints))[0]]


def beginning_of(body: bytes) -> bytes:
    """Returns what `routing.beginning` does for the prompt of a request of OpenAI's API; nothing if it has none."""
    if len(body) > _MAX_PARSED_BYTES:
        return b""
    try:
        fields = json.loads(body)
        prompt = fields.get("messages") or fields.get("input") or fields.get("prompt")
        if not isinstance(prompt, str):
            prompt = [message if isinstance(message, int) else _message(message) for message in prompt]
        return routing.beginning(build_request(prompt))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, InvalidRequestError):
        return b""


def _message(message: dict[str, Any]) -> Message:
    role, content = message.get("role", "assistant"), message.get("content") or ""  # calls and results have less
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return Message("system" if role == "developer" else role, text)


def by_requests(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """An autoscaling policy: as many replicas as have `target_ongoing_requests` each, running and waiting."""
    requests = (context.aggregated_metrics or {}).get("requests")
    if not requests:
        return context.target_num_replicas, {}
    return sum(requests.values()) / context.config.target_ongoing_requests, {}


def app(args: dict[str, str]) -> serve.Application:
    """Returns the application, for `serve run` and the `import_path` of a file.

    args: `flags`, those of `mpt-grpc serve`; by default, the host is the node's address and the ports are free ones.
    Raises SettingsError.
    """
    if unknown := args.keys() - {"flags"}:
        raise SettingsError(f"args: unknown key {min(unknown)!r}; the only one is flags")
    flags = args.get("flags", "")
    server = settings(parse(shlex.split(flags))).server
    if server.host in ALL_ADDRESSES:
        raise SettingsError(f"--host {server.host}: name the address that clients call, or omit it for the node's own")
    servers = serve.deployment(
        name="Server",
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=server.grace_s + _STOP_MARGIN_S,
        # No request passes through Serve, which warns if fewer may than are to be in flight.
        max_ongoing_requests=1_000_000,
    )(Server)
    targets = serve.deployment(name="Targets", ray_actor_options={"num_cpus": 0})(Targets)
    return targets.bind(servers.bind(flags))
