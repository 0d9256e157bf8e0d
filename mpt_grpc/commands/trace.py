"""`mpt-grpc trace show`: the spans of a trace in a file of `serve --trace-file`, as bars over time."""

from __future__ import annotations

import argparse
import contextlib
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
    """Prints the trace whose ID begins with `trace_id`, by default the last one of a request.

    Raises SettingsError if the file has no such trace.
    """
    spans = _spans(file)
    found = [span.trace_id for span in spans if span.trace_id.startswith(trace_id or "") and span.name != "step"]
    if not found:
        raise SettingsError(f"{file}: has no trace {trace_id or 'of a request'}")
    chosen = [span for span in spans if span.trace_id == found[-1]]
    first_s = min(span.start_s for span in chosen)
    length_s = max(max(span.end_s for span in chosen) - first_s, 1e-6)
    console.print(f"trace {found[-1]}")
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
    """Its events, counted by name, or why it failed."""


def _spans(file: str | Path) -> list[_Span]:
    """Returns the spans in a file, or in standard input if it is `-`. Raises SettingsError."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}: is not a file of serve --trace-file") from error
    lines = [line for line in text.split("\n") if line]
    spans = []
    for line in lines:
        # A full disk or a crash leaves lines that are cut off.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            spans.append(_span(json.loads(line)))
    if lines and not spans:
        raise SettingsError(f"{file}: is not a file of serve --trace-file")
    if num_broken := len(lines) - len(spans):
        print(f"mpt-grpc: {file}: {num_broken} broken lines are left out", file=sys.stderr)
    return spans


def _span(span: Mapping[str, Any]) -> _Span:
    context, status = span["context"], span["status"]
    events = Counter(event["name"] for event in span["events"])
    summary = ", ".join(name if count == 1 else f"{name} ({count} times)" for name, count in events.items())
    return _Span(
        span_id=context["span_id"],
        parent_id=span["parent_id"],
        trace_id=context["trace_id"].removeprefix("0x"),
        name=span["name"],
        start_s=datetime.fromisoformat(span["start_time"]).timestamp(),
        end_s=datetime.fromisoformat(span["end_time"]).timestamp(),
        has_failed=status["status_code"] == "ERROR",
        summary=printable(status.get("description", "")) or summary,
    )


def _in_order(spans: Sequence[_Span]) -> Iterator[tuple[_Span, int]]:
    """Yields spans with their depths: by their start, and each one's children after it."""
    known = {span.span_id for span in spans}

    def below(parent_id: str | None, depth: int) -> Iterator[tuple[_Span, int]]:
        children = [s for s in spans if (s.parent_id if s.parent_id in known else None) == parent_id]
        for span in sorted(children, key=lambda span: span.start_s):
            yield span, depth
            yield from below(span.span_id, depth + 1)

    return below(None, 0)
