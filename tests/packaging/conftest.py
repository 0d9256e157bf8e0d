"""Distributions built from the repository, and environments outside of it to install them in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Environment:
    """A virtual environment. Its commands run in its own folder and cannot import anything from the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # pip runs from this process's environment, since installing it in each would take seconds.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)

    def install(self, *requirements: str) -> None:
        """Installs requirements in the pinned versions, and the build of PyTorch that `make setup` was given."""
        index = os.environ.get("TORCH_INDEX")
        options = ["--no-compile", f"--constraint={ROOT / 'constraints.txt'}"]
        options += [f"--extra-index-url={index}"] if index else []
        self.pip("install", *options, *requirements)

    def pip(self, *arguments: str) -> None:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--python", str(self.folder / "bin/python"), *arguments], check=True, cwd=self.folder)

    def command(self, name: str) -> tuple[str, ...]:
        """Returns the command line of a program of this environment."""
        return "env", f"--chdir={self.folder}", "--unset=PYTHONPATH", str(self.folder / "bin" / name)

    def run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command(name), *arguments], capture_output=True, text=True, timeout=120, check=False
        )


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    """An empty environment, which is removed after the test since PyTorch is large."""
    environment = Environment(tmp_path / "venv")
    yield environment
    shutil.rmtree(environment.folder)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks, or would track."""
    copy = tmp_path_factory.mktemp("source")
    listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            copy.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def distributions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source distribution of each package, and the wheel that is built from it.

    Its kernels are not optimized, so that they are compiled in a quarter of the time.
    """
    folder = tmp_path_factory.mktemp("dist")
    compiler = tmp_path_factory.mktemp("compiler") / "c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n', encoding="utf-8")
    compiler.chmod(0o755)
    for package in (source, source / "clients/python"):
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, package]
        subprocess.run(build, check=True, capture_output=True, env=os.environ | {"CXX": str(compiler)})
    return folder


@pytest.fixture(scope="session")
def server_wheel(distributions: Path) -> Path:
    (wheel,) = distributions.glob("mpt_grpc-*.whl")
    return wheel


@pytest.fixture(scope="session")
def client_wheel(distributions: Path) -> Path:
    (wheel,) = distributions.glob("mpt_grpc_client-*.whl")
    return wheel
