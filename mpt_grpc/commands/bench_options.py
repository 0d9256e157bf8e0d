"""The flags of `mpt-grpc bench`, without grpc, since they are also built for `--help`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from mpt_grpc.bench.load import Lengths
from mpt_grpc.bench.metrics import OBJECTIVES
from mpt_grpc.commands.connection import add_connection
from mpt_grpc.commands.units import positive_float, positive_int, seconds


def add_flags(bench: argparse.ArgumentParser) -> None:
    """Adds the server, the load, the requests and the output."""
    server = bench.add_argument_group("server")
    address = server.add_mutually_exclusive_group()
    add_connection(server, address)
    address.add_argument(
        "--url",
        metavar="URL",
        help="an OpenAI-compatible API instead, such as http://localhost:8451/v1; OPENAI_API_KEY is sent if it is set",
    )
    bench.add_argument("--chat", action="store_true", help="send chat completions; requires --url")

    load = bench.add_argument_group("load").add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency",
        type=_ints,
        metavar="N,N,...",
        help="requests in progress; each starts when another ends; several values are measured in turn (default: 8)",
    )
    load.add_argument(
        "--rate",
        type=_floats,
        metavar="X,X,...",
        help="requests per second, at random times of a Poisson process, or at a trace's times, stretched",
    )

    requests = bench.add_argument_group("requests")
    requests.add_argument(
        "--num-requests", type=positive_int, metavar="N", help="requests of each load (default: 64, or the whole trace)"
    )
    requests.add_argument(
        "--prompt-tokens", type=_lengths, metavar="N|MIN-MAX", help="length of the random prompts (default: 64)"
    )
    requests.add_argument(
        "--output-tokens", type=_lengths, metavar="N|MIN-MAX", help="length of the outputs (default: 64)"
    )
    requests.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="times and lengths from a CSV file of the Azure LLM inference traces, scaled to the server's context",
    )
    requests.add_argument(
        "--warm-up",
        type=_count,
        metavar="N",
        help="requests sent at once before each load and not measured (default: as many as in progress, or 8)",
    )
    requests.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="seed of the times and lengths (default: 0)"
    )

    output = bench.add_argument_group("output")
    output.add_argument(
        "--objective",
        type=_objective,
        default={},
        metavar="NAME=TIME,...",
        help=f"count requests that meet these limits, such as ttft=200ms,tpot=50ms; names: {', '.join(OBJECTIVES)}",
    )
    output.add_argument("--output", type=_file, metavar="FILE", help="write the results as JSON")
    output.add_argument("--plot", type=_file, metavar="FILE", help="write plots as PNG; requires the extra bench")


def usage_error(parsed: argparse.Namespace) -> str | None:
    """Returns the error of a combination of flags that is not valid, or None."""
    if parsed.chat and parsed.url is None:
        return "argument --chat: requires --url"
    if parsed.trace is not None and (parsed.prompt_tokens or parsed.output_tokens):
        return "argument --trace: the trace sets the lengths; omit --prompt-tokens and --output-tokens"
    return None


def _ints(text: str) -> list[int]:
    return [positive_int(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [positive_float(part) for part in text.split(",")]


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def _lengths(text: str) -> Lengths:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or a range such as 64-512")
    lengths = Lengths(int(match[1]), int(match[2] or match[1]))
    if not 0 < lengths.min <= lengths.max:
        raise argparse.ArgumentTypeError(f"{text} is not a range above 0 from the lower to the higher number")
    return lengths


def _objective(text: str) -> dict[str, float]:
    objective = {}
    for part in text.split(","):
        name, _, limit = part.partition("=")
        if name not in OBJECTIVES:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=TIME with a name of {', '.join(OBJECTIVES)}")
        objective[name] = seconds(limit)
    return objective


def _file(text: str) -> Path:
    file = Path(text)
    if not file.parent.is_dir() or file.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: not a file in an existing folder")
    return file
