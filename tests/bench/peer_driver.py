"""A driver whose tokens come at fixed times, for tests of what runs it: `ladder` measures it as it does any library.

Each sequence has its first token a second after the one before it, and then one every eighth of a second. With 7 bits,
four sequences fail; with 5, they have a token too few.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers.drivers import ladder
from benchmarks.peers.drivers.ladder import Generate, Generation, Prompts


def convert(checkpoint: Path, folder: Path, bits: int) -> None:
    (folder / "converted").write_text(f"{checkpoint.name} {bits}", encoding="utf-8")


@contextmanager
def open_model(folder: Path, bits: int, threads: int) -> Iterator[Generate]:
    print(f"a library's own message about {folder}, {threads}")

    def generate(prompts: Prompts, new_tokens: int) -> Generation:
        if len(prompts) == 4 and bits == 7:
            sys.exit("no memory for four")
        if len(prompts) == 4 and bits == 5:
            new_tokens -= 1
        starts = range(1, len(prompts) + 1)
        return Generation(0.0, [[start + number / 8 for number in range(new_tokens)] for start in starts])

    yield generate


if __name__ == "__main__":
    ladder.run("pytest", open_model, convert)
