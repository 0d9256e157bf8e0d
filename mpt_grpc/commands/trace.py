"""`mpt-grpc trace show`: the spans of a trace in a file of `serve --trace-file`, as bars over time."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mpt_grpc.commands.printable import printable
from mpt_grpc.errors import SettingsError

_BAR_WIDTH, _MIN_BAR_WIDTH = 48, 12
_NAME_WIDTH = 28
_OTHERS_WIDTH = 14
"""What the spaces and the duration take."""


def run(parsed: argparse.Namespace) -> None:
    """Prints a trace. Raises SettingsError if the file has no such trace."""
    print_waterfall(Console(highlight=False), parsed.file, parsed.trace_id)


def print_waterfall(console: Console, file: str | Path, trace_id: str | None = None) -> None:
    """Prints the last trace of a request, or of those whose ID begins with `trace_id`; of a step if there is no other.

    Raises SettingsError if the file has no such trace.
    """
    spans, found = _Spans(file), None
    for span in spans:
        is_possible = span.name != "step" or (trace_id is not None and found is None)
        if is_possible and span.trace_id.startswith(trace_id or ""):
            found = span.trace_id
    if spans.num_broken:
        print(f"mpt-grpc: {file}: broken lines that are left out: {spans.num_broken}", file=sys.stderr)
    if found is None:
        raise SettingsError(f"{file}: has no trace {trace_id or 'of a request'}")
    chosen = [span for span in spans if span.trace_id == found]
    first_s = min(span.start_s for span in chosen)
    length_s = max(max(span.end_s for span in chosen) - first_s, 1e-6)
    console.print(f"trace {found}")
    rows = [
        (f"{'  ' * depth}{span.name.rpartition('Service/')[2]}"[:_NAME_WIDTH], span)
        for span, depth in _in_order(chosen)
    ]
    width = _BAR_WIDTH
    if console.is_terminal:
        needed = _NAME_WIDTH + _OTHERS_WIDTH + 2 + max(len(span.summary) for span in chosen)
        width = min(width, max(_MIN_BAR_WIDTH, console.width - needed))
    for name, span in rows:
        left = round((span.start_s - first_s) / length_s * width)
        bar = " " * left + "█" * max(1, round((span.end_s - span.start_s) / length_s * width))
        duration = f"{(span.end_s - span.start_s) * 1e3:8.1f} ms"
        line = f"{name:<{_NAME_WIDTH}} {bar:<{width + 1}} {duration}  {span.summary}"
        console.print(Text(line.rstrip(), style="red" if span.has_failed else ""), soft_wrap=True)


@dataclass(frozen=True)
class _Span:
    span_id: str
    parent_id: str | None
    trace_id: str
    name: str
    start_s: float
    end_s: float
    has_failed: bool
    summary: str
    """The events of the span, counted by name, or why it failed or was refused."""


class _Spans:
    """The spans in a file, or in standard input if it is `-`. A file is read anew each time, and never held whole."""

    def __init__(self, file: str | Path) -> None:
        self._file = file
        self._piped = sys.stdin.buffer.readlines() if file == "-" else None
        self.num_broken = 0
        """The number of lines read so far that a full disk or a crash has cut off."""

    def __iter__(self) -> Iterator[_Span]:
        """Raises SettingsError for a file that cannot be read, or without any span."""
        self.num_broken, num_spans = 0, 0
        for line in self._lines():
            try:
                span = _span(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self.num_broken += 1
                continue
            num_spans += 1
            yield span
        if self.num_broken and not num_spans:
            raise SettingsError(f"{self._file}: is not a file of serve --trace-file")

    def _lines(self) -> Iterator[bytes]:
        if self._piped is not None:
            yield from filter(bytes.strip, self._piped)
            return
        try:
            with open(self._file, "rb") as file:
                yield from filter(bytes.strip, file)
        except OSError as error:
            raise SettingsError(f"{self._file}: cannot be read: {error.strerror}") from error


def _span(span: Mapping[str, Any]) -> _Span:
    """Returns a span of a file. Raises ValueError, KeyError, TypeError or AttributeError if it is not one."""
    context, status, parent_id = span["context"], span["status"], span["parent_id"]
    error = _text(span.get("attributes", {}).get("error.type", ""))
    events = Counter(_text(event["name"]) for event in span["events"])
    summary = ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in events.items())
    return _Span(
        span_id=_text(context["span_id"]),
        parent_id=None if parent_id is None else _text(parent_id),
        trace_id=_text(context["trace_id"]).removeprefix("0x"),
        name=_text(span["name"]),
        start_s=datetime.fromisoformat(span["start_time"]).timestamp(),
        end_s=datetime.fromisoformat(span["end_time"]).timestamp(),
        has_failed=status["status_code"] == "ERROR" or bool(error),
        summary=_text(status.get("description", "")) or error or summary,
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"not a string: {value!r}")
    return printable(value)


def _in_order(spans: Sequence[_Span]) -> Iterator[tuple[_Span, int]]:
    """Yields spans with their depths: by their start, and each one's children after it."""
    known = {span.span_id for span in spans}
    children: dict[str | None, list[_Span]] = {}
    for span in sorted(spans, key=lambda span: span.start_s, reverse=True):
        children.setdefault(span.parent_id if span.parent_id in known else None, []).append(span)
    pending = [(span, 0) for span in children.get(None, ())]
    while pending:
        span, depth = pending.pop()
        yield span, depth
        pending += [(child, depth + 1) for child in children.get(span.span_id, ())]
