"""OpenAI's SDK and LangChain, as they are released, against a real server."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv/sdks/bin/python"
SCENARIOS = Path(__file__).with_name("scenarios.py")


@pytest.mark.parametrize("name", re.findall(r"^def (\w+)\(url: str\) -> None:", SCENARIOS.read_text(), re.MULTILINE))
def test_a_client_as_it_is_released_gets_what_it_asks_for(name: str, server: Any) -> None:
    if not PYTHON.exists():
        pytest.skip("the SDKs are not installed: make .venv/sdks/ready")
    ended = subprocess.run(
        [PYTHON, SCENARIOS, name, server.openai_url], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert name in ended.stdout
