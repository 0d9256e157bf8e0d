"""Attention over the paged KV cache, behind one interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.mpt import Attend
from mpt_grpc.step import StepPlan


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the tokens of one step stand; sequence i has the rows [first_rows[i], first_rows[i + 1])."""

    first_rows: tuple[int, ...]
    starts: tuple[int, ...]
    """Tokens of each sequence that were in the cache before the step."""
    block_tables: Tensor
    """[num_sequences, blocks of the longest], int64; padded with 0."""
    positions: Tensor
    """[num_tokens], int64: each token's place in its sequence."""
    blocks: Tensor
    """[num_tokens], int64: the block that each token's key and value go to."""
    offsets: Tensor
    """[num_tokens], int64: the place within that block."""

    @classmethod
    def from_plan(cls, plan: StepPlan, block_size: int, device: torch.device) -> AttentionMetadata:
        """Lays the plan's sequences one after the other, in the plan's order."""
        counts = [len(sequence.token_ids) for sequence in plan.sequences]
        starts = tuple(sequence.start for sequence in plan.sequences)
        first_rows = [0]
        for count in counts:
            first_rows.append(first_rows[-1] + count)
        width = max(len(sequence.block_table) for sequence in plan.sequences)
        tables = torch.tensor(
            [sequence.block_table + (0,) * (width - len(sequence.block_table)) for sequence in plan.sequences],
            device=device,
        )
        repeats = torch.tensor(counts, device=device)
        owners = torch.repeat_interleave(torch.arange(len(counts), device=device), repeats, output_size=first_rows[-1])
        shifts = torch.tensor([start - row for start, row in zip(starts, first_rows, strict=False)], device=device)
        positions = torch.arange(first_rows[-1], device=device) + shifts[owners]
        return cls(
            first_rows=tuple(first_rows),
            starts=starts,
            block_tables=tables,
            positions=positions,
            blocks=tables[owners, positions // block_size],
            offsets=positions % block_size,
        )


class AttentionBackend(Protocol):
    """Causal attention with ALiBi over a paged cache, softmax in float32."""

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> Attend:
        """Returns the attention of one step: it writes the new keys and values to `cache`, then attends."""
        ...
