"""A value that is read from files, and read again when they change."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from mpt_grpc.errors import SettingsError

Value = TypeVar("Value")
_log = logging.getLogger(__name__)
_MAX_READS = 3
"""How often changing files are read before the previous value is used: an event loop waits for it."""


class FileValue(Generic[Value]):
    """The value of files; any thread may use it."""

    def __init__(self, files: Sequence[Path], read: Callable[[], Value]) -> None:
        """`read` returns the value, or raises SettingsError, which this constructor passes on."""
        self._files, self._read = files, read
        self._lock = threading.Lock()
        self._state = self._file_state()
        self.value = read()
        """The value when the files were last read."""
        self.refresh()

    def refresh(self) -> Value:
        """Returns the value of the files as they are now, which are read if they have changed.

        A change that cannot be read is logged once, and the previous value stays in effect, as it does while the files
        change each time that they are read.
        """
        with self._lock:
            for _ in range(_MAX_READS):
                if (state := self._file_state()) == self._state:
                    break
                value, failure = self.value, None
                try:
                    value = self._read()
                except Exception as error:
                    failure = error
                # What is read while the files change, all at once if a link is moved to another folder, may be made of
                # old and new ones.
                if self._file_state() == state:
                    self._state, self.value = state, value
                    if failure is not None:
                        self._log_failure(failure)
            return self.value

    def _log_failure(self, failure: Exception) -> None:
        if isinstance(failure, SettingsError):
            _log.error("%s; the previous content stays in effect", failure)
        else:
            names = ", ".join(map(str, self._files))
            _log.error("%s could not be read; the previous content stays in effect", names, exc_info=failure)

    def _file_state(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_state, self._files))


def read_file(file: Path, flag: str) -> bytes:
    """Returns the content of a file, which the flag names. Raises SettingsError."""
    try:
        if stat.S_ISREG(os.stat(file).st_mode):
            return file.read_bytes()
    except OSError as error:
        raise SettingsError(f"{flag}: cannot read {file}: {error.strerror}") from error
    # Reading from a pipe or a device might wait forever.
    raise SettingsError(f"{flag}: {file} is not a regular file")


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    # Unlike the time of modification, this one cannot be set, as rsync does, and permissions change it as well.
    return status.st_ctime_ns, status.st_size, status.st_ino
