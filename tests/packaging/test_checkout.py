"""The package is imported from a checkout in which nothing was installed, as `make bench-gpu` does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import mpt_grpc


def test_a_checkout_that_is_not_installed_has_a_version(tmp_path: Path) -> None:
    (tmp_path / "mpt_grpc").mkdir()
    shutil.copy(Path(mpt_grpc.__file__), tmp_path / "mpt_grpc")
    command = (sys.executable, "-S", "-c", "import mpt_grpc; print(mpt_grpc.__version__)")
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0+checkout"
