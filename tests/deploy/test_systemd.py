"""The unit in deploy/systemd, as systemd reads it."""

from __future__ import annotations

import re
from pathlib import Path

from programs import DEPLOY, output_of, program_or_skip

from mpt_grpc.server import server
from mpt_grpc.settings import ServerSettings
from mpt_grpc.telemetry.exporting import EXPORT_TIMEOUT_S

UNIT = DEPLOY / "systemd/mpt-grpc.service"


def test_systemd_accepts_the_unit_and_finds_little_exposed(tmp_path: Path) -> None:
    analyze = program_or_skip("systemd-analyze")
    unit = tmp_path / UNIT.name
    text = UNIT.read_text(encoding="utf-8")
    assert text.count("/opt/mpt-grpc/bin/mpt-grpc serve") == 1
    unit.write_text(text.replace("/opt/mpt-grpc/bin/mpt-grpc", "/bin/true"), encoding="utf-8")
    assert output_of(analyze, "verify", "--man=no", unit) == ""
    output_of(analyze, "security", "--offline=yes", "--threshold=20", "--no-pager", unit)  # of 100


def test_systemd_waits_for_a_drain() -> None:
    (timeout,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert int(timeout) > ServerSettings().grace_s + server._STOP_TIMEOUT_S + EXPORT_TIMEOUT_S
