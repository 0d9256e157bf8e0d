"""Records clients/python/stream.svg: a terminal in which a stream survives two of its three servers.

The servers are processes, which are killed (SIGKILL) while the stream is read. Exits with an error unless the text is
the one that a single server generates.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mpt_grpc_client import Client, GenerateOptions
from tools.streams import ServerProcess

RECORDING = Path(__file__).parents[1] / "clients/python/stream.svg"
PROMPT = "Once upon a time"
MAX_NEW_TOKENS = 120
OPTIONS: GenerateOptions = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.7, "seed": 5, "ignore_eos": True}
KILLED_AFTER = (35, 80)
"""The numbers of tokens after which the server that runs the stream is killed."""
COLORS = ("green", "cyan", "yellow")
"""One for each server."""
WIDTH = 92


def main() -> None:
    servers = [ServerProcess() for _ in COLORS]
    try:
        for server in servers:
            server.wait_until_ready()
        screen = recorded(servers)
    finally:
        for server in servers:
            server.kill()
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(screen)
    svg = console.export_svg(title="one stream, three servers", unique_id="stream")
    # Rich's font is that of another website.
    svg = re.sub(r"@font-face {.*?}\s*", "", svg, flags=re.DOTALL)
    RECORDING.write_text(svg, encoding="utf-8")


def recorded(servers: Sequence[ServerProcess]) -> Text:
    """Returns what the terminal shows of the stream, in the color of the server that each part comes from."""
    by_target = {server.target: server for server in servers}
    with Client(servers[-1].target, timeout=60) as client:
        undisturbed = client.generate(PROMPT, **OPTIONS).text
    with Client(list(by_target), timeout=60) as client, client.stream(PROMPT, **OPTIONS) as stream:
        running, kills, screen = servers[0], iter(KILLED_AFTER), Text(PROMPT)
        kill_after = next(kills)
        for text in stream:
            if stream.resumptions:
                running = by_target[stream.resumptions[-1].target]
            screen.append(text, COLORS[servers.index(running)])
            if stream.num_tokens >= kill_after:
                running.process.kill()
                kill_after = next(kills, MAX_NEW_TOKENS + 1)
                screen.append("[killed]", "bold white on red")
    if stream.text != undisturbed or len(stream.resumptions) != len(KILLED_AFTER):
        raise SystemExit("the stream is not what it would have been")
    screen.append(f"\n\ncontinued by {len(stream.resumptions)} other servers, with the text of a single one")
    return screen


if __name__ == "__main__":
    main()
