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
SCENARIOS = [
    (file, name)
    for file in ENVIRONMENTS
    for name in re.findall(r"^def (\w+)\(url: str\) -> None:", (HERE / file).read_text(encoding="utf-8"), re.MULTILINE)
]

VERCEL = HERE / "vercel"


@pytest.mark.parametrize(("file", "name"), SCENARIOS, ids=[name for _, name in SCENARIOS])
def test_a_released_client_works_with_the_server(file: str, name: str, server: Any) -> None:
    run(file, name, server.openai_url)


@pytest.mark.skipif(
    shutil.which("node") is None or not (VERCEL / "node_modules").exists(),
    reason="the clients in JavaScript are not installed: run make tests/gateway/vercel/node_modules, with Node.js",
)
@pytest.mark.parametrize("name", ["vercel_agent", "vercel_structured_output", "openai_javascript"])
def test_a_released_client_in_javascript_works_with_the_server(name: str, server: Any) -> None:
    check(["node", str(VERCEL / "scenarios.mjs"), name, server.openai_url], name)


def test_a_key_of_openais_client_is_an_access_token(tmp_path: Path) -> None:
    with running("--tokens-file", str(access_tokens.write(tmp_path / "tokens.toml"))) as server:
        run("scenarios.py", "keys", server.openai_url, access_tokens.SECRETS["alice"])


def run(file: str, name: str, *arguments: str) -> None:
    """Runs a scenario in its environment."""
    environment = f".venv/{ENVIRONMENTS[file]}"
    python = ROOT / environment / "bin/python"
    if not python.exists():
        pytest.skip(f"the clients are not installed: run make {environment}/ready")
    check([str(python), str(HERE / file), name, *arguments], name)


def check(command: list[str], name: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert name in ended.stdout
