"""Runs released versions of OpenAI's SDKs, LangChain, LiteLLM and agent frameworks against a real server."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import access_tokens
import pytest
from server_process import running

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENTS = {
    "scenarios.py": "sdks",
    "scenarios_agents.py": "sdks",
    "scenarios_responses.py": "sdks",
    "scenarios_fields.py": "sdks",
    "scenarios_llamaindex.py": "llamaindex",
    "scenarios_litellm.py": "litellm",
}
VERCEL = HERE / "vercel"


@pytest.mark.parametrize("file", ENVIRONMENTS)
def test_released_clients_work_with_the_server(file: str, server: Any) -> None:
    source = (HERE / file).read_text(encoding="utf-8")
    run(file, re.findall(r"^def (\w+)\(url: str\) -> None:", source, re.MULTILINE), server.openai_url)


@pytest.mark.skipif(
    shutil.which("node") is None or not (VERCEL / "node_modules").exists(),
    reason="the clients in JavaScript are not installed: run make tests/gateway/vercel/node_modules, with Node.js",
)
def test_released_clients_in_javascript_work_with_the_server(server: Any) -> None:
    names = ["vercel_agent", "vercel_structured_output", "openai_javascript"]
    check(["node", str(VERCEL / "scenarios.mjs")], names, server.openai_url)


def test_a_key_of_openais_client_is_an_access_token(tmp_path: Path) -> None:
    with running("--tokens-file", str(access_tokens.write(tmp_path / "tokens.toml"))) as server:
        run("scenarios.py", ["keys"], server.openai_url, access_tokens.SECRETS["alice"])


def run(file: str, names: list[str], *arguments: str) -> None:
    """Runs scenarios of a file in its environment."""
    environment = f".venv/{ENVIRONMENTS[file]}"
    python = ROOT / environment / "bin/python"
    if not python.exists():
        pytest.skip(f"the clients are not installed: run make {environment}/ready")
    check([str(python), str(HERE / file)], names, *arguments)


def check(command: list[str], names: list[str], *arguments: str) -> None:
    """All scenarios pass, in one process: to import the clients takes most of the time."""
    ended = subprocess.run(
        [*command, ",".join(names), *arguments], capture_output=True, text=True, timeout=280, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stdout.splitlines() if line.startswith("passed ")] == [f"passed {n}" for n in names]
