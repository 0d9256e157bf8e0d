"""The results of a run: a table, the ratios to the best peers, JSON, and a picture, which needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.peers.peer import Column
from mpt_grpc.bench.report import markdown

Rates = Sequence[float]
_BITS = (16, 8)


@dataclass(frozen=True)
class Results:
    """A run. Rates are tokens per second by row, with one value for each round."""

    title: str
    """The date, the model, the machine and what was measured."""
    columns: Sequence[Column]
    limits: Mapping[str, Rates]
    """What the machine could reach with weights of 16 bits."""


def table(results: Results) -> str:
    """Returns the table in Markdown, the versions and the failures."""
    measured = [column for column in results.columns if column.rates]
    header = ["at once", *(column.peer.name for column in measured), "limit, 16-bit weights"]
    ratios = {bits: _best_ratios(results, bits) for bits in _BITS}
    header += [f"ours / best {bits}-bit peer" for bits, by_row in ratios.items() if by_row]
    rows = [header]
    for row, limits in results.limits.items():
        cells = [_cell(column.rates.get(row, ()), _rate) for column in measured]
        cells += [_cell(limits, _rate)]
        cells += [_cell(by_row.get(row, ()), _ratio) for by_row in ratios.values() if by_row]
        rows.append([row, *cells])
    versions = dict.fromkeys(column.version for column in measured)
    failures = [f"- {column.peer.name}: {column.failure}" for column in results.columns if column.failure]
    parts = [results.title, markdown(rows), f"Versions: {', '.join(versions)}."]
    return "\n\n".join(parts + (["Failed:\n\n" + "\n".join(failures)] if failures else []))


def as_json(results: Results) -> dict[str, Any]:
    return {
        "title": results.title,
        "limits": dict(results.limits),
        "columns": [
            {**asdict(column.peer), "version": column.version, "rates": column.rates, "failure": column.failure}
            for column in results.columns
        ],
    }


def save_plot(results: Results, file: Path) -> None:
    """Draws the medians, and their spread, into a PNG file; each row has its own scale."""
    measured = [column for column in results.columns if column.rates]
    figure = Figure(figsize=(3 * len(results.limits), 1.5 + 0.4 * len(measured)), layout="constrained")
    for axes, (row, limits) in zip(
        figure.subplots(1, len(results.limits), sharey=True), results.limits.items(), strict=True
    ):
        for column in measured:
            if rates := column.rates.get(row):
                middle = median(rates)
                spread = [[middle - min(rates)], [max(rates) - middle]]
                color = f"C{_BITS.index(column.peer.bits)}"
                alpha = 1 if column.peer.is_ours else 0.5
                axes.barh(column.peer.name, middle, xerr=spread, color=color, alpha=alpha)
        limit = axes.axvline(median(limits), color="black", linestyle="--", label="limit, 16-bit weights")
        axes.set(title=row if " " in row else f"{row} at once", xlabel="tokens/s", xlim=(0, None))
    axes.invert_yaxis()
    colors = [Patch(color=f"C{number}", label=f"{bits}-bit weights") for number, bits in enumerate(_BITS)]
    figure.legend(handles=[*colors, limit], loc="outside lower center", ncols=len(colors) + 1)
    figure.savefig(file, format="png", dpi=120)


def _best_ratios(results: Results, bits: int) -> dict[str, list[float]]:
    """Returns by row the ratios of our rates to those of the fastest peer with weights of as many bits, by round."""
    columns = [column for column in results.columns if column.peer.bits == bits]
    ratios = {}
    for row in results.limits:
        ours = [column.rates[row] for column in columns if column.peer.is_ours and row in column.rates]
        peers = [column.rates[row] for column in columns if not column.peer.is_ours and row in column.rates]
        if ours and peers:
            # A peer that has failed later has fewer rounds.
            ratios[row] = [mine / best for mine, best in zip(ours[0], max(peers, key=median), strict=False)]
    return ratios


def _cell(values: Rates, write: Callable[[float], str]) -> str:
    """Returns the median, with the least and the greatest value if there are several."""
    if not values:
        return ""
    spread = f" ({write(min(values))} to {write(max(values))})" if len(values) > 1 else ""
    return f"{write(median(values))}{spread}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"
