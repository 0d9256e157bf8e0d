"""The libraries that a run compares, and the processes that convert the weights for them and measure them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer

ROOT = Path(__file__).parents[2]
_DRIVERS = "benchmarks.peers.drivers"
_OURS = f"{_DRIVERS}.ours"
_SERVER_ENVIRONMENT = ".venv"
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Peer:
    """A library with weights of 16 or 8 bits: a column of the table."""

    name: str
    driver: str
    """The module that measures it, on top of `drivers.ladder`."""
    bits: int
    environment: str = _SERVER_ENVIRONMENT
    """The virtual environment that runs the driver; `make ENVIRONMENT/ready` makes it."""

    @property
    def is_ours(self) -> bool:
        return self.driver == _OURS

    @property
    def label(self) -> str:
        """The name of the peer in files."""
        return f"{self.driver.rpartition('.')[2]}-{self.bits}"

    @property
    def converts(self) -> bool:
        """Whether it needs the weights in a format of its own, as all libraries with their own environment do."""
        return self.environment != _SERVER_ENVIRONMENT


OURS = (Peer("mpt-grpc", _OURS, 16), Peer("mpt-grpc int8", _OURS, 8))
PEERS = (
    Peer("OpenVINO GenAI", f"{_DRIVERS}.openvino", 16, ".venv/peer-openvino"),
    Peer("OpenVINO GenAI int8", f"{_DRIVERS}.openvino", 8, ".venv/peer-openvino"),
    Peer("llama.cpp", f"{_DRIVERS}.llama_cpp", 16, ".venv/peer-llama_cpp"),
    Peer("llama.cpp Q8_0", f"{_DRIVERS}.llama_cpp", 8, ".venv/peer-llama_cpp"),
    Peer("CTranslate2 int8", f"{_DRIVERS}.ctranslate2", 8, ".venv/peer-ctranslate2"),
    Peer("transformers", f"{_DRIVERS}.transformers", 16),
)


@dataclass
class Column:
    """What has been measured of a peer; a failure ends its measurements."""

    peer: Peer
    version: str = ""
    rates: dict[str, list[float]] = field(default_factory=dict)
    """Tokens per second by row, one value for each round."""
    failure: str | None = None


class PeerError(Exception):
    """A peer that is not installed, or whose process failed; the message has the last line that it wrote."""


def convert(peer: Peer, checkpoint: Path, threads: int) -> Path:
    """Returns the folder that the peer loads, beside the checkpoint; writes it if it is missing. Raises PeerError."""
    if not peer.converts:
        return checkpoint
    folder = checkpoint.with_name(peer.label)
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for _ in _lines(peer, folder, threads, "convert", str(checkpoint), str(partial), str(peer.bits)):
            pass
        partial.rename(folder)
    return folder


def measure(column: Column, folder: Path, threads: int, sequences: Sequence[int]) -> None:
    """Adds a round of measurements to the column. Raises PeerError; what was measured before the failure counts."""
    peer = column.peer
    arguments = (str(folder), str(peer.bits), str(threads), *map(str, sequences))
    for line in map(json.loads, _lines(peer, folder, threads, "measure", *arguments)):
        if "version" in line:
            column.version = line["version"]
        else:
            column.rates.setdefault(line["row"], []).append(line["tokens_per_s"])


def _lines(peer: Peer, folder: Path, threads: int, *arguments: str) -> Iterator[str]:
    """Yields the lines that the driver prints. What it writes to standard error is kept beside the folder.

    Raises PeerError if it fails or takes longer than half an hour.
    """
    python = ROOT / peer.environment / "bin/python"
    if not python.exists():
        raise PeerError(f"not installed: make {peer.environment}/ready")
    log = folder.with_name(f"{peer.label}.log")
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [str(python), "-m", peer.driver, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,
        )
    timer = Timer(_TIMEOUT_S, _kill, [process])
    timer.start()
    try:
        assert process.stdout is not None
        yield from process.stdout
        status = process.wait()
    finally:
        timer.cancel()
        _kill(process)
    if status:
        written = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        # What a signal has ended does not write why.
        reason = written[-1] if written and status > 0 else f"ended with status {status}"
        raise PeerError(f"{reason} (see {log})")


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends the process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
