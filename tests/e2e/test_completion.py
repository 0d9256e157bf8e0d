"""The completion of commands and flags in a shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("shtab", reason="the extra completion is not installed")

CLI = (sys.executable, "-m", "mpt_grpc.cli", "completion")
COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_shtab_mpt_grpc
echo "${COMPREPLY[@]}"
"""
"""Prints the completions of the last word of a command, as bash does when Tab is pressed."""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    printed = subprocess.run((*CLI, "bash"), capture_output=True, check=True)
    file = tmp_path_factory.mktemp("completion") / "mpt-grpc.bash"
    file.write_bytes(printed.stdout)
    return file


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (["ba"], {"batch"}),
        (["comp"], {"completion"}),
        (["batch", "--conc"], {"--concurrency"}),
        (["token", "new", "alice", "--role", ""], {"generate", "observe", "admin"}),
        (["completion", ""], {"bash", "zsh"}),
    ],
)
def test_bash_completes_commands_flags_and_values(script: Path, words: list[str], completions: set[str]) -> None:
    command = ("bash", "-c", COMPLETE, "bash", str(script), "mpt-grpc", *words)
    assert completions == set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_zsh_gets_a_script_of_its_own() -> None:
    printed = subprocess.run((*CLI, "zsh"), capture_output=True, text=True, check=True).stdout
    assert printed.startswith("#compdef mpt-grpc\n")
    assert ":FILE:_files" in printed


def test_an_installation_without_the_extra_says_so() -> None:
    code = (
        'import sys; sys.modules["shtab"] = None; from mpt_grpc.cli import main; sys.exit(main(["completion", "zsh"]))'
    )
    ended = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=False)
    why = "mpt-grpc: completion requires shtab; install the extra 'completion' (see docs/install.md)\n"
    assert (ended.returncode, ended.stderr) == (1, why)
