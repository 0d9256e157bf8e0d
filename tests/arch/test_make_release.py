"""`make constraints` writes what is installed to constraints.txt, or nothing, and `make sbom` states the version."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLD = "# The versions.\nabsl-py==2.5.0\n"


def make_constraints(folder: Path, freeze: str) -> int:
    """Runs it with a Python whose `pip freeze` is a shell command. Returns the exit status."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "constraints.txt").write_text(OLD)
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n[ "$3" = freeze ] || exit 0\n{freeze}\n')
    python.chmod(0o755)
    command = ("make", "--old-file", ".venv/dev", "constraints", "BIN=bin")
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False).returncode


def test_versions_are_written_without_the_names_of_builds(tmp_path: Path) -> None:
    assert make_constraints(tmp_path, "echo absl-py==2.5.1; echo torch==2.9.0+cpu") == 0
    assert (tmp_path / "constraints.txt").read_text() == "# The versions.\nabsl-py==2.5.1\ntorch==2.9.0\n"


@pytest.mark.parametrize("freeze", ["exit 1", "echo absl-py==2.5.1; exit 1"])
def test_constraints_stay_when_the_versions_cannot_be_read(tmp_path: Path, freeze: str) -> None:
    assert make_constraints(tmp_path, freeze) != 0
    assert (tmp_path / "constraints.txt").read_text() == OLD


def test_the_list_of_an_installation_names_its_version(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for program, script in (
        ("runtime/bin/python", "echo 9.8.7"),
        ("release/bin/cyclonedx-py", 'cp "$3" "$6"'),
    ):
        path = tmp_path / ".venv" / program
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    ready = [f"--old-file=.venv/{name}/ready" for name in ("release", "runtime")]
    subprocess.run(["make", *ready, "sbom"], cwd=tmp_path, capture_output=True, timeout=60, check=True)
    project = tomllib.loads((tmp_path / "dist/sbom.cdx.json").read_text(encoding="utf-8"))["project"]
    assert (project["name"], project["version"]) == ("mpt-grpc", "9.8.7")
    assert "dynamic" not in project
