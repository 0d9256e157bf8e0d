"""`make torture` and `make soak` in short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_streams_of_killed_servers_go_on_without_a_difference() -> None:
    command = (sys.executable, ROOT / "tools" / "torture.py", "--rounds", "1", "--faults", "kill")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    row = ended.stdout.splitlines()[-1]
    assert (found := re.search(r"1  +30  +(\d+)  +0  +", row)), row
    assert int(found[1]) > 0


def test_nothing_is_left_of_callers_good_and_bad() -> None:
    # Memory is that of a process that has just started; it is still growing.
    command = (sys.executable, "-m", "tools.soak", "--minutes", "0.12", "--max-growth", "30")
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, (ended.stdout, ended.stderr)
    assert re.search(r"blocks in use +0 +0\n", ended.stdout)
