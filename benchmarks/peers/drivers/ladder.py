"""The measurements that every driver makes with its library, and how it reports them: as lines of JSON.

python -m benchmarks.peers.drivers.DRIVER convert CHECKPOINT FOLDER BITS
python -m benchmarks.peers.drivers.DRIVER measure FOLDER BITS THREADS SEQUENCES...
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random

PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 64, 128, 512
PREFILL = f"prefill of {PREFILL_TOKENS}"
"""The row of the prefill; the others are named by their number of sequences."""
_WARM_UP_TOKENS = 4
# Every tokenizer has these, whatever the rows of the embedding.
_PROMPT_IDS = range(1, 1000)


@dataclass(frozen=True)
class Generation:
    """When the calls for all sequences began and when each token of each sequence was there, in seconds."""

    start_s: float
    token_times_s: Sequence[Sequence[float]]


Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts, int], Generation]
"""Continues all prompts at once, greedily, by a number of tokens, whatever they are."""
Convert = Callable[[Path, Path, int], None]
"""Writes a checkpoint to a folder in the library's format, with weights of 16 or 8 bits."""
Open = Callable[[Path, int, int], AbstractContextManager[Generate]]
"""Loads a folder with weights of 16 or 8 bits, to compute with a number of threads."""


def run(distribution: str, open_model: Open, convert: Convert | None = None) -> None:
    """Does what the command line says with a library, which the Python package `distribution` contains."""
    command, folder, *arguments = sys.argv[1:]
    if command == "convert":
        assert convert is not None
        convert(Path(folder), Path(arguments[0]), int(arguments[1]))
        return
    # What libraries print to standard output goes to standard error.
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as output:
        os.dup2(2, 1)

        def report(**line: object) -> None:
            output.write(json.dumps(line) + "\n")

        report(version=f"{distribution} {version(distribution)}")
        bits, threads, *sequences = (int(argument) for argument in arguments)
        with open_model(Path(folder), bits, threads) as generate:
            measure(generate, sequences, report)


def measure(generate: Generate, sequences: Sequence[int], report: Callable[..., None]) -> None:
    """Reports tokens per second for each number of sequences and for the prefill, each after a warm-up."""
    random = Random(0)

    def generation(num: int, prompt_tokens: int, new_tokens: int) -> Generation:
        # All prompts are different, also from those of the warm-up: a prefix cache finds none.
        made = generate([random.choices(_PROMPT_IDS, k=prompt_tokens) for _ in range(num)], new_tokens)
        lengths = [len(times) for times in made.token_times_s]
        if lengths != [new_tokens] * num:
            raise RuntimeError(f"{lengths} tokens instead of {num} times {new_tokens}")
        return made

    for num in sequences:
        generation(num, PROMPT_TOKENS, _WARM_UP_TOKENS)
        report(row=str(num), tokens_per_s=decode_rate(generation(num, PROMPT_TOKENS, NEW_TOKENS)))
    generation(1, PREFILL_TOKENS, 1)
    prefill = generation(1, PREFILL_TOKENS, 1)
    report(row=PREFILL, tokens_per_s=PREFILL_TOKENS / (prefill.token_times_s[0][0] - prefill.start_s))


def decode_rate(generation: Generation) -> float:
    """Returns the tokens per second of all sequences together while all of them decode.

    This is from the last one's first token to the first one's last token.
    """
    start_s = max(times[0] for times in generation.token_times_s)
    end_s = min(times[-1] for times in generation.token_times_s)
    counted = [time_s for times in generation.token_times_s for time_s in times if start_s < time_s <= end_s]
    return len(counted) / (end_s - start_s)
