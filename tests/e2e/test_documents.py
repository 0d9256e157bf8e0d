"""The examples and commands in the READMEs and in docs/ work as written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpt_grpc_client import GenerateOptions, Message, RepetitionGuard, Role
from mpt_grpc_client.request import build_request

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PAGES = (
    "install",
    "cli",
    "serving",
    "scaling",
    "telemetry",
    "security",
    "checkpoints",
    "clients",
    "generation",
    "tools",
    "openai",
    "batch",
    "guarantees",
    "evaluation",
    "benchmarking",
    "limitations",
    "compatibility",
    "names",
    "architecture",
)
SOURCES = (ROOT, ROOT / "mpt_grpc", ROOT / "clients/python/mpt_grpc_client")
"""The folders to which the paths in docs/architecture.md are relative."""
READMES = ("README.md", "clients/python/README.md", *(f"docs/{name}.md" for name in PAGES))
EXTERNAL_FLAGS = {"--torch-backend", "--cacert", "--cert", "--key", "--share", "--time"}
"""The flags of other programs that the documents name."""
HISTORICAL = re.compile(r"^\|.*\|.*\|(.*)\|$", re.MULTILINE)
"""The last column of the tables in docs/names.md: names that no longer exist."""
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "benchmarks/*.md", "deploy/*.md", "clients/**/*.md", "docs/**/*.md", "mpt_grpc/**/*.md")
    for path in ROOT.glob(pattern)
    if "node_modules" not in path.parts
)
ADDRESS = "localhost:50051"
HTTP = "http://localhost:8451"
SDKS = ROOT / ".venv/sdks/bin/python"
# Runs a block that may use await at its top level, as in `python -m asyncio`.
RUN_BLOCK = """
import ast, asyncio, sys
block = eval(compile(sys.stdin.read(), "block", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), {"__name__": "__main__"})
if block is not None:
    asyncio.run(block)
"""


def blocks(language: str) -> list[Any]:
    """Returns every code block in a language as a parameter."""
    found = []
    for name in READMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for number, match in enumerate(re.finditer(rf"```{language}\n(.*?)```", text, re.DOTALL)):
            found.append(pytest.param(match[1], id=f"{name}-{number}"))
    assert found
    return found


def commands() -> list[Any]:
    """Returns every command in the shell blocks as a parameter. A backslash joins a line with the next."""
    lines = "".join(block.values[0] for block in blocks("sh")).replace("\\\n", " ").splitlines()
    return [pytest.param(line, id=" ".join(shlex.split(line, comments=True)[:6])) for line in lines if line.strip()]


def run(command: list[str], server: Any, stdin: str = "") -> str:
    """Runs a command with the environment's binaries on its path, and returns what it prints."""
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


def with_addresses(text: str, server: Any) -> str:
    """Replaces the default addresses with those of the server."""
    return text.replace(ADDRESS, server.target).replace(HTTP, server.openai_url.removesuffix("/v1"))


@pytest.mark.parametrize("block", blocks("python"))
def test_a_python_block_runs_and_prints_something(block: str, server: Any) -> None:
    python = Path(sys.executable)
    if "langchain" in block or "openai" in block:
        python = SDKS
        if not python.exists():
            pytest.skip("the SDKs are not installed: run make .venv/sdks/ready")
    block = with_addresses(block, server)
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
            printed = run(["sh", "-c", with_addresses(command, server)], server)
            assert any(
                word in printed for word in ("TextGenerationService", "SERVING", '"text"', "token_bytes", "num_blocks")
            )
        case ".venv/bin/pip" | "pip":
            folder, _, extra = arguments[-1].removesuffix("]").partition("[")
            folder = "." if "dist/" in folder else folder
            project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            assert not extra or extra in project["optional-dependencies"]
        case ".venv/bin/mpt-grpc" if arguments[0] in ("serve", "gateway", "verify", "eval"):  # run by other tests
            flags = {argument for argument in arguments if argument.startswith("--")}
            help_text = run([sys.executable, "-m", "mpt_grpc.cli", arguments[0], "--help"], server)
            assert flags <= set(re.findall(r"--[a-z][a-z-]+", help_text))
        case ".venv/bin/mpt-grpc" | "curl" | "echo":
            command = with_addresses(command.replace(".venv/bin/mpt-grpc", f"{sys.executable} -m mpt_grpc.cli"), server)
            command += " --num-requests 4" if arguments[0] == "bench" else ""  # the default takes half a minute
            assert run(["sh", "-c", command], server, stdin="Who are you?\n")  # an output may be short but not empty
        case _:
            pytest.fail(f"this test does not know how to run {command!r}")


def test_the_generation_page_has_an_example_of_every_option() -> None:
    page = (ROOT / "docs/generation.md").read_text(encoding="utf-8")
    options = dict(re.findall(r"^\| `(\w+)=(.+?)` ", page, re.MULTILINE))
    for name, value in options.items():
        prompt = "Hello" if name == "truncate_prompt_tokens" else [Message(Role.USER, "Hello")]
        if name != "timeout":  # an option of the call, not of the request
            build_request(prompt, **{name: eval(value, {"RepetitionGuard": RepetitionGuard})})
    documented = options.keys() | set(re.findall(r"^`(\w+)` (?:is one of|are)", page, re.MULTILINE))
    assert documented == GenerateOptions.__optional_keys__ | {"timeout"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_to_a_file_has_a_target(name: str) -> None:
    document = ROOT / name
    links = re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


@pytest.fixture(scope="module")
def flags(server: Any) -> set[str]:
    """The flags of all commands."""
    commands = (
        "",
        "serve",
        "gateway",
        "generate",
        "chat",
        "batch",
        "token",
        "top",
        "trace",
        "eval",
        "bench",
        "completion",
    )
    help_text = "".join(
        run([sys.executable, "-m", "mpt_grpc", *filter(None, (command,)), "--help"], server) for command in commands
    )
    return set(re.findall(r"--[a-z][a-z-]+", help_text))


@pytest.mark.parametrize("name", READMES)
def test_every_flag_in_the_prose_exists(name: str, flags: set[str]) -> None:
    prose = re.sub(r"```.*?```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    if name == "docs/names.md":
        prose = HISTORICAL.sub(lambda row: row[0].removesuffix(f"{row[1]}|"), prose)
    assert set(re.findall(r"--[a-z][a-z-]+", prose)) <= flags | EXTERNAL_FLAGS


def test_every_promise_names_a_test_that_exists() -> None:
    page = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*\.+ \| `([\w/]+\.py)::(test_\w+)` \|$", page, re.MULTILINE)
    assert len(rows) == page.count(". | `tests/") > 10
    for file, name in rows:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name


def test_everything_that_the_architecture_page_names_exists() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"[\w/]+\.(?:py|proto|toml|html|js)\b", page))
    assert [path for path in paths if not any((folder / path).exists() for folder in SOURCES)] == []
    code = [ROOT / "pyproject.toml", *(ROOT / "protos").rglob("*.proto")]
    code += [path for folder in ("mpt_grpc", "clients/python", "tests") for path in (ROOT / folder).rglob("*.py")]
    words = set(re.findall(r"\w+", "".join(path.read_text(encoding="utf-8") for path in code)))
    names = set(re.findall(r"`(\w+(?:\.\w+)*)`", page)) - paths
    assert [name for name in names if not words.issuperset(name.split("."))] == []
    pairs = list(named_in_files(page.partition("\n| Place ")[2].partition("\n\n")[0].partition("\n")[2]))
    assert len(pairs) > 10
    assert [pair for pair in pairs if not is_defined(*pair)] == []


def named_in_files(table: str) -> Iterator[tuple[str, str]]:
    """Yields the files and the names that a table says are in them: those of the first column and of the second, unless
    another file follows a name after "in"."""
    for _, place, what, *_ in (row.split("|") for row in table.splitlines()):
        for name, elsewhere in re.findall(r"`(\w+)`(?: in `([\w/]+\.py)`)?", what):
            yield elsewhere or place.strip(" `"), name


def is_defined(file: str, name: str) -> bool:
    path = next(folder / file for folder in (ROOT / "mpt_grpc", ROOT) if (folder / file).exists())
    definition = rf"^\s*(?:async def|def|class|message) {name}\b|^{name}\b.* = "
    return re.search(definition, path.read_text(encoding="utf-8"), re.MULTILINE) is not None
