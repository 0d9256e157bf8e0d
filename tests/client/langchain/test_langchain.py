"""`mpt_grpc_client.langchain` with released versions of LangChain, against a real server."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PYTHON = ROOT / ".venv/sdks/bin/python"
# Without this project's pytest configuration and fixtures, which need packages that this environment does not have.
FLAGS = ("-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", HERE, "--confcutdir", HERE, "-o", "asyncio_mode=auto")


@pytest.mark.parametrize("suite", ["standard.py", "suite.py"])
def test_a_suite_passes(suite: str, server: Any) -> None:
    if not PYTHON.exists():
        pytest.skip("the SDKs are not installed: make .venv/sdks/ready")
    environment = {**os.environ, "MPT_GRPC_TARGET": server.target, "PYTHONPATH": str(ROOT / "clients/python")}
    ended = subprocess.run(
        [PYTHON, "-m", "pytest", HERE / suite, "-q", "--benchmark-disable", *FLAGS],
        env=environment,
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"\d\d passed", ended.stdout), ended.stdout
