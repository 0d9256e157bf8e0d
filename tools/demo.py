"""Demonstrates the service: starts a server on the built-in model and streams eight prompts from it concurrently."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from mpt_grpc.commands.trace import print_waterfall
from mpt_grpc_client import Client, Generation, Load

PROMPTS = (
    "Once upon a time there was a little",
    "The fox",
    "“Good morning,” said the old rabbit. “I have been looking for you everywhere, because",
    "There was once a king who had three sons. The two elder were proud and strong, but the youngest was kind, and one"
    " day the king called them all to him and said:",
    "It was snowing.",
    "Peter ran down to the river as fast as his legs would carry him, and there on the bank he saw",
    "The princess opened the door of the tower, and",
    "In the middle of the forest stood a small house. Nobody had lived in it for a hundred years, so the children were"
    " very much surprised when they saw smoke coming out of the chimney. They crept nearer, and",
)
MAX_NEW_TOKENS = 120


def main() -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        trace_file = Path(folder) / "spans.jsonl"
        with running_server(trace_file) as (target, welcome), Client(target, timeout=120) as client:
            console.print(welcome, highlight=False, markup=False)
            before = client.get_server_info().load
            generations = stream_all(client, console)
            after = client.get_server_info().load
        print_table(console, generations, before, after)
        console.print()
        print_waterfall(console, trace_file, generations[-1].trace_id)


@contextmanager
def running_server(trace_file: Path) -> Iterator[tuple[str, str]]:
    """Starts a server, yields its target and its startup message, then stops it; exits if the server fails."""
    command = [
        sys.executable,
        "-m",
        "mpt_grpc.cli",
        "serve",
        "--grpc-port",
        "0",
        "--no-http",
        "--trace-file",
        str(trace_file),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        welcome = []
        assert process.stdout is not None
        for line in process.stdout:
            welcome.append(line.rstrip())
            if line.strip().startswith("try"):
                break
        targets = [line.split()[1] for line in welcome if line.strip().startswith("gRPC")]
        if not targets:
            sys.exit("the server did not start; see its output above")
        yield targets[0], "\n".join(welcome)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    if status:
        sys.exit(f"the server exited with status {status}")


def stream_all(client: Client, console: Console) -> list[Generation]:
    """Streams all prompts concurrently and shows the texts as they grow."""
    texts = list(PROMPTS)
    start = threading.Barrier(len(PROMPTS))

    def stream(index: int) -> Generation:
        start.wait()
        with client.stream(PROMPTS[index], max_new_tokens=MAX_NEW_TOKENS, temperature=0.7, seed=index + 1) as pieces:
            for piece in pieces:
                texts[index] += piece
        return pieces.result

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        futures = [pool.submit(stream, index) for index in range(len(PROMPTS))]
        if console.is_terminal:
            with Live(get_renderable=lambda: side_by_side(texts, console), console=console, refresh_per_second=12):
                generations = [future.result() for future in futures]
        else:
            generations = [future.result() for future in futures]
            for index, text in enumerate(texts):
                console.print(
                    f"[{index + 1}] {' '.join(text.split())}\n", highlight=False, markup=False, soft_wrap=True
                )
    return generations


def side_by_side(texts: list[str], console: Console) -> Columns:
    """Returns the ends of the texts in two rows of four panels."""
    width, height = console.width // 4 - 1, max(6, (console.height - 2) // 2)
    max_characters = (width - 4) * (height - 3)
    panels = [
        Panel(" ".join(text.split())[-max_characters:], title=str(index + 1), width=width, height=height)
        for index, text in enumerate(texts)
    ]
    return Columns(panels, padding=0)


def print_table(console: Console, generations: list[Generation], before: Load, after: Load) -> None:
    table = Table("request", "prompt", "new", "finish", "TTFT ms", "TPOT ms", "tokens/s", title="eight requests")
    for index, generation in enumerate(generations):
        usage, timings = generation.usage, generation.timings
        decode_s, first_s = timings.decode_time or 0.0, timings.time_to_first_token or 0.0
        table.add_row(
            str(index + 1),
            str(usage.num_prompt_tokens),
            str(usage.num_output_tokens),
            generation.finish.reason.name.lower(),
            f"{first_s * 1e3:.0f}",
            f"{decode_s * 1e3 / max(1, usage.num_output_tokens - 1):.1f}",
            f"{usage.num_output_tokens / (first_s + decode_s):.0f}",
        )
    console.print(table)
    steps = after.num_steps - before.num_steps
    busy_s = max((g.timings.time_to_first_token or 0) + (g.timings.decode_time or 0) for g in generations)
    new_tokens = after.num_output_tokens - before.num_output_tokens
    console.print(
        f"{new_tokens} new tokens in {steps} steps and {busy_s:.1f} s: {new_tokens / busy_s:.0f} tokens/s,"
        f" mean batch size {(after.num_batched_sequences - before.num_batched_sequences) / steps:.1f}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
