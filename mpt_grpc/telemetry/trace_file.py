"""The file of `--trace-file`: one span per line, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult


class TraceFile(SpanExporter):
    """Appends spans to a file. A line that a full disk or a crash has cut off is ended before the next span."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._file = path.open("ab", buffering=0)
        self._is_cut_off = path.is_file() and not _ends_with_a_line(path)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Raises OSError, which the thread that exports logs."""
        lines = "".join(f"{span.to_json(indent=None)}\n" for span in spans).encode()
        rest = b"\n" + lines if self._is_cut_off else lines
        while rest:
            num_written = self._file.write(rest)
            self._is_cut_off = rest[num_written - 1 : num_written] != b"\n"
            rest = rest[num_written:]
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._file.close()


def _ends_with_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, 2):
            file.seek(-1, 2)
        return file.read() in (b"", b"\n")
