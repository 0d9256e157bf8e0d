"""`make check` compares the protos with the last release: v1 must stay compatible, v1alpha1 may change."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = Path(__file__).parents[2] / "protos"
BUF = Path(sys.executable).with_name("buf")
FIELD = re.compile(r"^  string request_id = 1;$", flags=re.MULTILINE)


def breaking_changes(tmp_path: Path, package: str, replacement: str) -> str:
    """Returns what buf reports after replacing the first `request_id` field of a package."""
    protos = shutil.copytree(PROTOS, tmp_path / "protos")
    (file,) = (protos / "mpt" / package).iterdir()
    changed, count = FIELD.subn(replacement, file.read_text(encoding="utf-8"), count=1)
    assert count == 1
    file.write_text(changed, encoding="utf-8")
    command = [BUF, "breaking", "protos", "--against", "protos/released.txtpb"]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("replacement", "report"),
    [
        ("  string id = 1;", 'changed name from "request_id" to "id"'),
        ("", 'Previously present field "1" with name "request_id"'),
        ("  bytes request_id = 1;", 'changed type from "string" to "bytes"'),
    ],
    ids=["renamed", "removed", "retyped"],
)
def test_a_changed_v1_field_is_reported(tmp_path: Path, replacement: str, report: str) -> None:
    assert report in breaking_changes(tmp_path, "v1", replacement)


def test_a_new_v1_field_is_compatible(tmp_path: Path) -> None:
    assert breaking_changes(tmp_path, "v1", "  string request_id = 1;\n  string added = 1000;") == ""


def test_a_removed_v1alpha1_field_is_not_reported(tmp_path: Path) -> None:
    assert breaking_changes(tmp_path, "v1alpha1", "") == ""
