"""The client installs without the server and its libraries, and runs on the oldest and newest supported versions."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from server_process import ServerProcess

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LOOK = """
from importlib.util import find_spec
import mpt_grpc_client
unwanted = ("torch", "numpy", "transformers", "mpt_grpc")
print(mpt_grpc_client.Client.__name__, [name for name in unwanted if find_spec(name)])
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the kernels are compiled


def test_the_wheel_installs_and_imports_alone(environment: Any, client_wheel: Path) -> None:
    environment.install(str(client_wheel))
    assert environment.run("python", "-c", LOOK).stdout == "Client []\n"


@pytest.mark.parametrize("versions", ["client-oldest", "client-newest"])
def test_calls_succeed_without_warnings(versions: str, server: ServerProcess) -> None:
    python = ROOT / ".venv" / versions / "bin/python"
    if not python.exists():
        pytest.skip(f"the client is not installed: make .venv/{versions}/ready")
    command = [python, "-I", "-W", "default", HERE / "client_calls.py", server.target]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.stderr) == ("generated, streamed, refused\n", "")
