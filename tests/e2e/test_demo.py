"""`make demo` shows concurrent streams, a table and a trace."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_demo_streams_eight_prompts_in_one_batch_and_shows_a_trace() -> None:
    ended = subprocess.run(
        [sys.executable, "tools/demo.py"], capture_output=True, text=True, timeout=200, check=False, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    output = ended.stdout

    assert re.match(r"mpt-grpc \S+ serving demo: ", output)
    texts = re.findall(r"^\[(\d)\] (.+)$", output, re.MULTILINE)
    assert [number for number, _ in texts] == list("12345678")
    assert "eight requests" in output
    rows = re.findall(r"^│ (\d) +│ +(\d+) +│ +(\d+) +│ (\w+)", output, re.MULTILINE)
    assert [row[0] for row in rows] == list("12345678")
    assert all(0 < int(new) <= 120 for _, _, new, _ in rows)

    (batch_size,) = re.findall(r"mean batch size ([\d.]+)", output)
    assert float(batch_size) > 2  # on a busy machine, the streams do not begin together

    _, _, waterfall = output.partition("\ntrace ")
    assert re.match(r"[0-9a-f]{32}\n", waterfall)
    bars = re.findall(r"^ *(\w+) +█+ +[\d.]+ ms", waterfall, re.MULTILINE)
    assert sorted(bars) == ["StreamGenerate", "decode", "prefill", "queue"]
    assert bars[0] == "StreamGenerate"
