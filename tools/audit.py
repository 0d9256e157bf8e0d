"""Looks up the versions in constraints.txt among PyPI's security advisories, with pip-audit.

Prints each known vulnerability, and exits with status 1 if there is one. What cannot be looked up, as on a machine
without a connection to PyPI, is counted and does not fail.

Usage: python tools/audit.py PIP_AUDIT
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
TIMEOUT_S = 60


def main() -> int:
    options = ["--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json"]
    command = [sys.argv[1], "--requirement", str(CONSTRAINTS), *options]
    try:
        audit = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"The advisories cannot be reached within {TIMEOUT_S} seconds.")
        return 0
    if not audit.stdout:
        print(f"The advisories cannot be reached: {(audit.stderr.splitlines() or [''])[-1][:200]}")
        return 0
    packages = json.loads(audit.stdout)["dependencies"]
    vulnerable = [(package, found) for package in packages for found in package.get("vulns", ())]
    for package, found in vulnerable:
        remedy = f"install {', '.join(found['fix_versions'])}" if found["fix_versions"] else "no release fixes it yet"
        print(f"{package['name']} {package['version']}: {found['id']}; {remedy}")
    num_unknown = sum("skip_reason" in package for package in packages)
    print(f"{len(vulnerable)} known in {len(packages) - num_unknown} packages; {num_unknown} could not be looked up.")
    return int(bool(vulnerable))


if __name__ == "__main__":
    sys.exit(main())
