"""`make torture` and `make soak` in short, and the recording of what they show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import recording

ROOT = Path(__file__).parents[2]
KEPT_RECORDING = recording.RECORDING


def rows(*arguments: str) -> dict[str, list[str]]:
    """Returns the rows of the table by their first cell."""
    command = (sys.executable, "-m", "tools.torture", "--rounds", "1", *arguments)
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, (ended.stdout, ended.stderr)
    cells = [line.strip("|").split("|") for line in ended.stdout.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells[2:]}


def test_streams_of_killed_servers_go_on_without_a_difference() -> None:
    (row,) = rows("--faults", "kill", "--loads").values()
    assert row[:3] == ["1", "30", "0"]
    assert int(row[3]) > 0


def test_streams_beside_loads_are_not_different_either() -> None:
    loads = rows("--faults", "--loads", "flood", "slow", "cancel", "huge", "--streams", "15", "--cancels", "320")
    assert [(row[0], row[2], row[3]) for row in loads.values()] == [("1", "0", "1")] * 4


def test_nothing_is_left_of_callers_good_and_bad() -> None:
    # Memory is that of a process that has just started; it is still growing.
    command = (sys.executable, "-m", "tools.soak", "--minutes", "0.12", "--max-growth", "30")
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, (ended.stdout, ended.stderr)
    assert re.search(r"blocks in use +0 +0\n", ended.stdout)


def test_the_recording_is_of_a_stream_that_survives_two_servers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(recording, "RECORDING", tmp_path / "stream.svg")
    recording.main()
    made, kept = (path.read_text(encoding="utf-8") for path in (recording.RECORDING, KEPT_RECORDING))
    for svg in (made, kept):
        text = re.sub("<[^>]*>", "", svg).replace("&#160;", " ")
        assert text.count("[killed]") == 2
        assert "continued by 2 other servers, with the text of a single one" in text
        assert "url(http" not in svg
