"""The results of a run: a table to read and JSON to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpt_grpc.bench.load import Load
from mpt_grpc.bench.metrics import Summary, Timeline, summarize

_DISTRIBUTIONS = {
    "TTFT": "time_to_first_token",
    "ITL": "inter_token_latency",
    "TPOT": "time_per_output_token",
    "end to end": "end_to_end_latency",
    "start delay": "start_delay",
}


@dataclass(frozen=True)
class Result:
    """A load with what was measured; at least one request has ended."""

    load: Load
    timelines: Sequence[Timeline]
    summary: Summary


def result(load: Load, timelines: Sequence[Timeline], objective: Mapping[str, float]) -> Result:
    return Result(load, timelines, summarize(timelines, objective))


def table(results: Sequence[Result]) -> str:
    """Returns a Markdown table with a column for each load."""
    columns = [_column(result.summary) for result in results]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    rows = [["", *(result.load.name for result in results)]]
    rows += [[label, *(column.get(label, "") for column in columns)] for label in labels]
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, whose first row is its header, with all columns but the first aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(_padded(row, widths)) + " |" for row in rows]
    rule = "|" + "|".join(f"{'-' * (width + 1)}{':' if number else '-'}" for number, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def as_json(settings: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Returns the settings of the run, the statistics, and the times of each request, in seconds."""
    return {
        **settings,
        "loads": [
            {
                "name": result.load.name,
                **asdict(result.summary),
                "requests": [_request(timeline) for timeline in result.timelines],
            }
            for result in results
        ],
    }


def _column(summary: Summary) -> dict[str, str]:
    """Returns the cells of a load by the labels of their rows."""
    cells = {"requests": str(summary.num_completed)}
    cells |= {f"failed: {status}": str(num) for status, num in sorted(summary.failures.items())}
    cells |= {
        "duration, s": f"{summary.duration:.1f}",
        "requests/s": f"{summary.requests_per_second:.2f}",
    }
    if summary.goodput is not None:
        cells["goodput, requests/s"] = f"{summary.goodput:.2f}"
    cells |= {
        "output tokens/s": f"{summary.output_tokens_per_second:,.1f}",
        "total tokens/s": f"{summary.total_tokens_per_second:,.1f}",
    }
    for label, name in _DISTRIBUTIONS.items():
        if (distribution := getattr(summary, name)) is not None:
            for statistic, seconds in asdict(distribution).items():
                cells[f"{label}, ms, {statistic}"] = f"{seconds * 1e3:,.2f}"
    return cells


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.rjust(width) if number else cell.ljust(width)
        for number, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _request(timeline: Timeline) -> dict[str, Any]:
    request: dict[str, Any] = {"start": timeline.start_s, "end": timeline.end_s}
    if timeline.failure is not None:
        return {**request, "failure": timeline.failure}
    return {
        **request,
        "num_prompt_tokens": timeline.num_prompt_tokens,
        "num_output_tokens": timeline.num_output_tokens,
        "time_to_first_token": timeline.time_to_first_token,
        "time_per_output_token": timeline.time_per_output_token,
        "end_to_end_latency": timeline.end_to_end_latency,
    }
