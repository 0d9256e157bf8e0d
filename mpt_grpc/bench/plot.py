"""The picture of a run: latency and throughput against the load, and the batch over time. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from mpt_grpc.bench.metrics import batch_over_time
from mpt_grpc.bench.report import Result

_STATISTICS = ("p50", "p90", "p99")


def save(results: Sequence[Result], file: Path) -> None:
    """Draws the results into a PNG file."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    ((ttft, itl), (throughput, batch)) = figure.subplots(2, 2)
    names = [result.load.name for result in results]
    for axes, title, name in (
        (ttft, "Time to first token", "time_to_first_token"),
        (itl, "Inter-token latency", "inter_token_latency"),
    ):
        distributions = [getattr(result.summary, name) for result in results]
        for statistic in _STATISTICS:
            milliseconds = [getattr(distribution, statistic, float("nan")) * 1e3 for distribution in distributions]
            axes.plot(names, milliseconds, marker="o", label=statistic)
        axes.set(title=title, xlabel="load", ylabel="ms", ylim=(0, None))
        axes.legend()
    throughput.bar(names, [result.summary.output_tokens_per_second for result in results])
    throughput.set(title="Throughput", xlabel="load", ylabel="output tokens/s")
    for result in results:
        steps = batch_over_time(result.timelines)
        if steps:
            batch.step(*zip(*steps, strict=True), where="post", label=result.load.name)
    batch.set(title="Batch over time", xlabel="s", ylabel="streams between first and last token", ylim=(0, None))
    batch.legend()
    figure.savefig(file, format="png", dpi=120)
