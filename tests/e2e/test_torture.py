"""`make torture` in short: two of three servers are killed while 30 streams are in progress."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TORTURE = Path(__file__).parents[2] / "tools" / "torture.py"


def test_streams_of_killed_servers_go_on_without_a_difference() -> None:
    command = (sys.executable, TORTURE, "--rounds", "1", "--faults", "kill")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    row = ended.stdout.splitlines()[-1]
    assert (found := re.search(r"1  +30  +(\d+)  +0  +", row)), row
    assert int(found[1]) > 0
