"""Values of files that change."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from mpt_grpc.errors import SettingsError
from mpt_grpc.file_value import FileValue, read_file


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


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_not_a_regular_file_is_refused_at_the_start_and_leaves_the_value_later(
    make: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "text"
    make(file)

    def value() -> FileValue[bytes]:
        return FileValue([file], lambda: read_file(file, "--text"))

    with pytest.raises(SettingsError, match=f"^--text: {file} is not a regular file$"):
        value()
    file.rename(tmp_path / "other")
    file.write_text("old", encoding="utf-8")
    read = value()
    file.unlink()
    make(file)
    assert [read.refresh(), read.refresh()] == [b"old", b"old"]
    assert caplog.messages == [f"--text: {file} is not a regular file; the previous content stays in effect"]


def test_a_file_whose_permissions_change_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.touch()

    def read() -> str:
        if not file.stat().st_mode & stat.S_IROTH:  # the user who runs tests may be root, who reads every file
            raise PermissionError(13, "Permission denied")
        return file.read_text(encoding="utf-8")

    file.chmod(0o644)
    value = FileValue([file], read)
    file.chmod(0o600)
    file.write_text("new", encoding="utf-8")
    assert value.refresh() == ""
    changed_ns = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == changed_ns:  # whose clock ticks every few milliseconds on some systems
        file.chmod(0o644)
    assert value.refresh() == "new"


def test_a_file_that_is_restored_with_its_old_time_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("old", encoding="utf-8")
    value = FileValue([file], lambda: file.read_text(encoding="utf-8"))
    times = file.stat()
    file.write_text("new", encoding="utf-8")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    while file.stat().st_ctime_ns == times.st_ctime_ns:  # some file systems count in milliseconds
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert value.refresh() == "new"


def point(link: Path, folder: Path) -> None:
    """Moves a link to another folder at once, as Kubernetes does when a secret changes."""
    new = link.with_name("new")
    new.symlink_to(folder)
    new.replace(link)


def test_files_behind_a_link_that_moves_while_they_are_read_are_read_together(tmp_path: Path) -> None:
    for number in ("1", "2", "3"):
        folder = tmp_path / number
        folder.mkdir()
        for name in ("certificate", "key"):
            (folder / name).write_text(number, encoding="utf-8")
    point(tmp_path / "..data", tmp_path / "1")
    files = [tmp_path / "..data" / name for name in ("certificate", "key")]
    moves = ["2", "3"]

    def read() -> tuple[str, str]:
        certificate = files[0].read_text(encoding="utf-8")
        if moves:
            point(tmp_path / "..data", tmp_path / moves.pop(0))
        return certificate, files[1].read_text(encoding="utf-8")

    value = FileValue(files, read)
    assert value.value == ("3", "3")
    point(tmp_path / "..data", tmp_path / "1")
    moves.append("2")
    assert value.refresh() == ("2", "2")


def test_files_that_change_whenever_they_are_read_leave_the_value_until_they_no_longer_do(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.touch()
    is_changing = False

    def read() -> str:
        text = file.read_text(encoding="utf-8")
        if is_changing and len(text) < 100:
            file.write_text(text + "x", encoding="utf-8")
        return text

    value = FileValue([file], read)
    file.write_text("x", encoding="utf-8")
    is_changing = True
    assert [value.refresh(), value.refresh()] == ["", ""]
    is_changing = False
    assert value.refresh() == file.read_text(encoding="utf-8")
