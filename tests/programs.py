"""The programs that check the files in deploy/: from the development tools, or of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[1] / "deploy"
_PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def program(name: str) -> str:
    """Returns the path of a development tool."""
    path = shutil.which(name, path=_PATH)
    assert path is not None, f"{name} is one of the development tools: run make .venv/dev"
    return path


def program_or_skip(name: str) -> str:
    """Returns the path of a program that not every machine has, or skips the test."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}")
    return path


def output_of(*command: str | Path) -> str:
    """Runs a command that must succeed, and returns what it prints."""
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
