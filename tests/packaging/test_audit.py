"""What `make audit` prints of the advisories for the pinned packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[2] / "tools" / "audit.py"
SOUND = {"name": "attrs", "version": "26.1.0", "vulns": []}
VULNERABLE = {"name": "jinja2", "version": "2.4", "vulns": [{"id": "CVE-2016-10745", "fix_versions": ["2.8.1"]}]}
UNKNOWN = {"name": "yarl", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("found", "status", "printed"),
    [
        ([SOUND, UNKNOWN], 0, "0 known in 1 packages; 1 could not be looked up.\n"),
        (
            [SOUND, VULNERABLE],
            1,
            "jinja2 2.4: CVE-2016-10745; install 2.8.1\n1 known in 2 packages; 0 could not be looked up.\n",
        ),
        (None, 0, "The advisories cannot be reached: no connection\n"),
    ],
)
def test_vulnerabilities_are_printed_with_their_remedies(
    tmp_path: Path, found: list[object] | None, status: int, printed: str
) -> None:
    pip_audit = tmp_path / "pip-audit"
    output = "echo no connection >&2" if found is None else f"echo '{json.dumps({'dependencies': found})}'"
    pip_audit.write_text(f"#!/bin/sh\n{output}\n")
    pip_audit.chmod(0o755)
    result = subprocess.run([sys.executable, AUDIT, pip_audit], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (status, printed)
