"""Stops before pip downloads PyTorch's CUDA build, about 3 GB, to a machine without an NVIDIA GPU.

Runs before the dependencies are installed, so it uses the standard library only. Exits with status 1 if pip would take
the CUDA build and neither TORCH_INDEX nor TORCH_CUDA is set.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    wants_cuda = shutil.which("nvidia-smi") or os.environ.get("TORCH_INDEX") or os.environ.get("TORCH_CUDA")
    if wants_cuda or not any(requirement.startswith("nvidia-") for requirement in _requirements_of_torch()):
        return 0
    print(
        "pip would download PyTorch's CUDA build, about 3 GB, but this machine has no NVIDIA GPU. Set TORCH_INDEX to"
        " the URL of the CPU index on https://pytorch.org/get-started/locally/, or TORCH_CUDA=1 to download it anyway.",
        file=sys.stderr,
    )
    return 1


def _requirements_of_torch() -> list[str]:
    """Returns the requirements of the build that pip would install; empty if pip cannot tell."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        what = ("--dry-run", "--ignore-installed", "--no-deps", "--constraint", ROOT / "constraints.txt", "torch")
        subprocess.run([*pip, "--report", report, *what], capture_output=True, check=False)
        if not report.exists():
            return []
        (torch,) = json.loads(report.read_text(encoding="utf-8"))["install"]
        requirements: list[str] = torch["metadata"].get("requires_dist", [])
        return requirements


if __name__ == "__main__":
    sys.exit(main())
