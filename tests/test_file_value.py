"""Values of files that change."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt_grpc.file_value import FileValue


def test_a_file_that_cannot_be_read_for_whatever_reason_leaves_the_value(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "number"
    file.write_text("1", encoding="utf-8")
    value = FileValue([file], lambda: 1 // int(file.read_text(encoding="utf-8")))
    for unreadable in ("0", "one"):
        file.write_text(unreadable, encoding="utf-8")
        assert [value.refresh(), value.refresh()] == [1, 1]
    (first, second) = caplog.messages
    assert first == second == f"{file} could not be read; the previous content stays in effect"
    file.write_text("-1", encoding="utf-8")
    assert value.refresh() == -1
