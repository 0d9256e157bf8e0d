"""The client is a package of its own: whoever installs it gets no model's libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOOK = """
from importlib.util import find_spec
import mpt_grpc_client
unwanted = ("torch", "numpy", "transformers", "mpt_grpc")
print(mpt_grpc_client.Client.__name__, [name for name in unwanted if find_spec(name)])
"""


def test_the_client_installs_and_imports_alone(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", "constraints.txt", "./clients/python"], check=True, cwd=ROOT)
    # From another folder, and without this one's paths, so that nothing of the checkout is found.
    look = [str(venv / "bin" / "python"), "-I", "-c", LOOK]
    assert subprocess.run(look, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == "Client []\n"
