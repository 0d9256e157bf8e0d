"""Measures this project's server and other libraries in turn, with the same random weights.

make bench
python -m benchmarks.peers --d-model 1024 --layers 12 --rounds 1 --peers openvino-16 transformers-16

Weights and what the libraries make of them are kept in build/bench/; results are written there, or to --output.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median

import torch

from benchmarks.peers import checkpoint, machine, report
from benchmarks.peers.checkpoint import Shape
from benchmarks.peers.drivers.ladder import PREFILL
from benchmarks.peers.peer import OURS, PEERS, ROOT, Column, PeerError, convert, measure

_WORK = ROOT / "build/bench"


def main() -> None:
    arguments = _arguments()
    shape = Shape(arguments.d_model, arguments.layers, arguments.heads, arguments.vocab_size)
    model = _checkpoint(shape, arguments.tokenizer)
    torch.set_num_threads(arguments.threads)
    columns = [Column(peer) for peer in (*OURS, *PEERS) if peer in OURS or peer.label in arguments.peers]
    limits: list[machine.Limits] = []
    arguments.output.mkdir(parents=True, exist_ok=True)
    for number in range(1, arguments.rounds + 1):
        _say(f"round {number} of {arguments.rounds}")
        limits.append(machine.measure())
        # Every second round backwards: a drift of the machine's speed affects all peers alike.
        _measure_all(columns if number % 2 else columns[::-1], model, arguments)
        # After each round: an interrupted run leaves a table.
        table = _write(arguments, shape, columns, limits)
    print(table)


def _measure_all(columns: Sequence[Column], model: Path, arguments: argparse.Namespace) -> None:
    for column in columns:
        if column.failure is not None:
            continue
        _say(column.peer.name)
        try:
            folder = convert(column.peer, model, arguments.threads)
            measure(column, folder, arguments.threads, arguments.sequences)
        except PeerError as error:
            column.failure = str(error)
            _say(column.failure)


def _write(
    arguments: argparse.Namespace, shape: Shape, columns: Sequence[Column], limits: Sequence[machine.Limits]
) -> str:
    """Writes the results of the rounds until now; returns the table."""
    title = (
        f"{date.today()}, {machine.description(arguments.threads)}, reads"
        f" {median(limit.read_bytes_per_s for limit in limits) / 1e9:.1f} GB/s, multiplies matrices at"
        f" {median(limit.flops_per_s for limit in limits) / 1e9:.0f} GFLOP/s; {shape.num_parameters / 1e6:,.0f} M"
        f" random weights ({shape.name}); tokens/s"
    )
    if len(limits) > 1:
        title += f", median, minimum and maximum of {len(limits)} rounds"
    by_row = {str(num): [limit.decode(shape, num) for limit in limits] for num in arguments.sequences}
    results = report.Results(title, columns, by_row | {PREFILL: [limit.prefill(shape) for limit in limits]})
    table = report.table(results)
    (arguments.output / "results.md").write_text(table + "\n", encoding="utf-8")
    as_json = json.dumps(report.as_json(results), indent=1)
    (arguments.output / "results.json").write_text(as_json + "\n", encoding="utf-8")
    report.save_plot(results, arguments.output / "results.png")
    return table


def _checkpoint(shape: Shape, tokenizer: Path) -> Path:
    folder: Path = _WORK / shape.name / "checkpoint"
    if not folder.exists():
        _say(f"writing {folder}")
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        checkpoint.write(partial, shape, tokenizer)
        partial.rename(folder)
    return folder


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    labels = [peer.label for peer in PEERS]
    shape = parser.add_argument_group("shape of the model")
    shape.add_argument("--d-model", type=int, default=2048)
    shape.add_argument("--layers", type=int, default=24)
    shape.add_argument("--heads", type=int, default=16)
    shape.add_argument("--vocab-size", type=int, default=50_432)
    shape.add_argument("--tokenizer", type=Path, default=ROOT / "mpt_grpc/demo", help="a folder with a tokenizer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 8, 16], help="numbers of them at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=labels, default=labels, help="libraries, and bits of a weight")
    parser.add_argument("--output", type=Path, default=_WORK, help="the folder for the results")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    return arguments


if __name__ == "__main__":
    main()
