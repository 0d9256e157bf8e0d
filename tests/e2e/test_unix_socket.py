"""The commands and the HTTP side of a server on a Unix socket."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_calls import call

CLI = (sys.executable, "-m", "mpt_grpc.cli")
FLAGS = ("--max-new-tokens", "12", "--temperature", "0")
BODY = {"prompt": "The fox", "max_tokens": 12, "temperature": 0}


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_commands_gateways_and_grpcurl_reach_the_socket_and_proxies_never_touch_it(
    tmp_path: Path, start_server: Callable[..., Any], start_gateway: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mpt.sock"
    with monkeypatch.context() as proxied:
        for variable in ("grpc_proxy", "https_proxy", "http_proxy"):
            proxied.setenv(variable, "http://127.0.0.1:9")
        server = start_server("--grpc-socket", str(path))
        assert server.target == f"unix:{path}"
        gateway = start_gateway("--target", server.target)
        text = output_of(*CLI, "generate", "The fox", "--target", server.target, *FLAGS)
    for side in (server, gateway):
        assert call(side, "/ready")
        assert call(side, "/v1/completions", BODY)["choices"][0]["text"] == text.removesuffix("\n")
    if grpcurl := shutil.which("grpcurl", path=str(Path(sys.executable).parent)):
        method = "grpc.health.v1.Health/Check"
        assert "SERVING" in output_of(grpcurl, "-plaintext", "-unix", str(path), method)
    server.terminate()
    assert server.wait() == 0
    assert not path.exists()


def test_a_socket_and_a_port_exclude_each_other(tmp_path: Path) -> None:
    command = (*CLI, "serve", "--grpc-port", "0", "--grpc-socket", str(tmp_path / "mpt.sock"))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "--grpc-socket: not allowed with argument --grpc-port" in ended.stderr


def test_a_socket_as_the_host_names_the_flag_for_it() -> None:
    command = (*CLI, "serve", "--host", "unix:/run/mpt.sock")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "--host: 'unix:/run/mpt.sock'" in ended.stderr
    assert "--grpc-socket PATH listens on a Unix socket" in ended.stderr
