"""transformers: `generate` on one batch, in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import MptForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.peers.drivers import ladder
from benchmarks.peers.drivers.ladder import Generate, Generation, Prompts


class _Clock(StoppingCriteria):
    """Records the time of each step and never stops."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        self.times_s.append(perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@contextmanager
def open_model(folder: Path, _bits: int, threads: int) -> Iterator[Generate]:
    torch.set_num_threads(threads)
    model: Any = MptForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def generate(prompts: Prompts, new_tokens: int) -> Generation:
        ids, clock = torch.tensor(prompts), _Clock()
        start_s = perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return Generation(start_s, [clock.times_s] * len(prompts))

    yield generate


if __name__ == "__main__":
    ladder.run("transformers", open_model)
