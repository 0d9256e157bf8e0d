"""What the READMEs and the pages in docs/ tell a reader to type works as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mpt_grpc_client import GenerateOptions, Message, RepetitionGuard, Role
from mpt_grpc_client.request import build_request

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PAGES = ("install", "serving", "clients", "generation", "openai", "evaluation", "limitations", "compatibility", "names")
READMES = ("README.md", "clients/python/README.md", *(f"docs/{name}.md" for name in PAGES))
EXTERNAL_FLAGS = {"--torch-backend"}
"""The flags of other programs that the documents name."""
HISTORICAL = re.compile(r"^\|.*\|.*\|(.*)\|$", re.MULTILINE)
"""The last column of the tables in docs/names.md: names that no longer exist."""
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "benchmarks/*.md", "clients/**/*.md", "docs/**/*.md", "mpt_grpc/**/*.md")
    for path in ROOT.glob(pattern)
)
ADDRESS = "localhost:50051"
HTTP = "http://localhost:8451"
SDKS = ROOT / ".venv/sdks/bin/python"
# A block may await at its top level, as in `python -m asyncio`.
RUN_BLOCK = """
import ast, asyncio, sys
block = eval(compile(sys.stdin.read(), "block", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), {"__name__": "__main__"})
if block is not None:
    asyncio.run(block)
"""


def blocks(language: str) -> list[Any]:
    """Every code block of the READMEs in a language, as parameters."""
    found = []
    for name in READMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for number, match in enumerate(re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL)):
            found.append(pytest.param(match[1], id=f"{name}-{number}"))
    assert found
    return found


def commands() -> list[Any]:
    """Every command of the shell blocks, as parameters; a command may go on over lines that end with a backslash."""
    lines = "".join(block.values[0] for block in blocks("sh")).replace("\\\n", " ").splitlines()
    return [pytest.param(line, id=" ".join(shlex.split(line, comments=True)[:6])) for line in lines if line.strip()]


def run(command: list[str], server: Any, stdin: str = "") -> str:
    """Runs a command, with the binaries of the environment at hand, and returns what it prints."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "MPT_GRPC_TARGET": server.target,
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env=environment
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def at_the_server(text: str, server: Any) -> str:
    """The text with the addresses of the tests' server."""
    return text.replace(ADDRESS, server.target).replace(HTTP, server.openai_url.removesuffix("/v1"))


@pytest.mark.parametrize("block", blocks("python"))
def test_a_python_block_runs_and_prints(block: str, server: Any) -> None:
    python = Path(sys.executable)
    if "langchain" in block or "openai" in block:
        python = SDKS
        if not python.exists():
            pytest.skip("LangChain is not installed: make .venv/sdks/ready")
    block = at_the_server(block, server)
    assert run([str(python), "-c", RUN_BLOCK], server, block).strip()


@pytest.mark.parametrize("command", commands())
def test_a_shell_command_works(command: str, server: Any) -> None:
    program, *arguments = shlex.split(command, comments=True)
    if (
        program in ("buf", "curl", "grpcurl")
        and shutil.which(program, path=f"{BIN}{os.pathsep}{os.environ['PATH']}") is None
    ):
        pytest.skip(f"{program} is not in this environment")
    match program:
        case "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        case "grpcurl" | "buf":
            printed = run(["sh", "-c", at_the_server(command, server)], server)
            assert any(word in printed for word in ("TextGenerationService", "SERVING", '"text"', "num_blocks"))
        case ".venv/bin/pip" | "pip":
            folder, _, extra = arguments[-1].removesuffix("]").partition("[")
            folder = "." if folder.startswith("dist/") else folder
            project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            assert not extra or extra in project["optional-dependencies"]
        case ".venv/bin/mpt-grpc" if arguments[0] in ("serve", "gateway"):
            flags = {argument for argument in arguments if argument.startswith("--")}
            help_text = run([sys.executable, "-m", "mpt_grpc.cli", arguments[0], "--help"], server)
            assert flags <= set(re.findall(r"--[a-z][a-z-]+", help_text))
        case ".venv/bin/mpt-grpc" | "curl" | "echo":
            command = at_the_server(command.replace(".venv/bin/mpt-grpc", f"{sys.executable} -m mpt_grpc.cli"), server)
            assert run(["sh", "-c", command], server, stdin="Who are you?\n")  # the model may say little
        case _:
            pytest.fail(f"nobody knows how to try {command!r}")


def test_the_page_about_generation_has_an_example_of_every_option() -> None:
    page = (ROOT / "docs/generation.md").read_text(encoding="utf-8")
    options = dict(re.findall(r"^\| `(\w+)=(.+?)` ", page, re.MULTILINE))
    for name, value in options.items():
        messages = [Message(Role.USER, "Hello")] if name == "drop_oldest_turns" else "Hello"
        if name != "timeout":  # of the call, not of the request
            build_request(messages, **{name: eval(value, {"RepetitionGuard": RepetitionGuard})})
    documented = options.keys() | set(re.findall(r"^`(\w+)` (?:is one of|are)", page, re.MULTILINE))
    assert documented == GenerateOptions.__optional_keys__ | {"timeout"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_to_a_file_leads_to_one(name: str) -> None:
    document = ROOT / name
    links = re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("name", READMES)
def test_every_flag_that_a_readme_names_exists(name: str, server: Any) -> None:
    prose = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    if name == "docs/names.md":
        prose = HISTORICAL.sub(lambda row: row[0].removesuffix(f"{row[1]}|"), prose)
    commands = ("", "serve", "gateway", "generate", "chat", "eval")
    help_text = "".join(
        run([sys.executable, "-m", "mpt_grpc", *filter(None, (command,)), "--help"], server) for command in commands
    )
    flags = set(re.findall(r"--[a-z][a-z-]+", help_text))
    assert set(re.findall(r"--[a-z][a-z-]+", prose)) <= flags | EXTERNAL_FLAGS
