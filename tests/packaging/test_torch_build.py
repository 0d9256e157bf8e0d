"""`make` does not download PyTorch's CUDA build by accident."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/check_torch_build.py"
CUDA, CPU = ["filelock", "nvidia-cublas==13.1; platform_system == 'Linux'"], ["filelock"]


def check(tmp_path: Path, requirements: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the tool with a pip that would install a build with these requirements."""
    report = json.dumps({"install": [{"metadata": {"requires_dist": requirements}}]})
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/__init__.py").touch()
    (tmp_path / "pip/__main__.py").write_text(
        f"import sys\nopen(sys.argv[sys.argv.index('--report') + 1], 'w').write({report!r})\n", encoding="utf-8"
    )
    return subprocess.run(
        [sys.executable, TOOL],
        env={"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path), "HOME": os.environ["HOME"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_cuda_build_is_refused_without_a_gpu(tmp_path: Path) -> None:
    refused = check(tmp_path, CUDA)
    assert refused.returncode == 1
    assert "Set TORCH_INDEX" in refused.stderr


@pytest.mark.parametrize("variable", ["TORCH_INDEX", "TORCH_CUDA"])
def test_the_cuda_build_is_accepted_on_request(tmp_path: Path, variable: str) -> None:
    assert check(tmp_path, CUDA, **{variable: "1"}).returncode == 0


def test_the_cuda_build_is_accepted_with_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert check(tmp_path, CUDA).returncode == 0


def test_the_cpu_build_is_accepted(tmp_path: Path) -> None:
    assert check(tmp_path, CPU).returncode == 0
