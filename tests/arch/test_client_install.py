"""The client is a separate package, and installing it does not install the model's dependencies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECK = """
from importlib.util import find_spec
import mpt_grpc_client
unwanted = ("torch", "numpy", "transformers", "mpt_grpc")
print(mpt_grpc_client.Client.__name__, [name for name in unwanted if find_spec(name)])
"""


def test_client_installs_and_imports_without_the_server(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", "constraints.txt", "./clients/python"], check=True, cwd=ROOT)
    # Run in another folder and in isolated mode, so that nothing is imported from the checkout.
    check = [str(venv / "bin" / "python"), "-I", "-c", CHECK]
    assert subprocess.run(check, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == "Client []\n"
