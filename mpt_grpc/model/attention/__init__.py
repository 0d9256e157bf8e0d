"""Attention over the paged KV cache: the interface that backends implement."""

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
    """Where a step's tokens are; sequence i has the tokens [query_starts[i], query_starts[i + 1]) of the step."""

    query_starts: tuple[int, ...]
    starts: tuple[int, ...]
    """The number of each sequence's tokens that were in the cache before the step."""
    block_tables: Tensor
    """[num_sequences, blocks of the longest sequence], int64; padded with 0."""
    positions: Tensor
    """[num_tokens], int64: each token's position in its sequence."""
    blocks: Tensor
    """[num_tokens], int64: the block in which each token's key and value are stored."""
    offsets: Tensor
    """[num_tokens], int64: each token's position within its block."""

    @classmethod
    def from_plan(cls, plan: StepPlan, block_size: int, device: torch.device) -> AttentionMetadata:
        """Concatenates the plan's sequences, in the plan's order."""
        counts = [len(sequence.token_ids) for sequence in plan.sequences]
        starts = tuple(sequence.start for sequence in plan.sequences)
        query_starts = [0]
        for count in counts:
            query_starts.append(query_starts[-1] + count)
        width = max(len(sequence.block_table) for sequence in plan.sequences)
        tables = torch.tensor(
            [sequence.block_table + (0,) * (width - len(sequence.block_table)) for sequence in plan.sequences],
            device=device,
        )
        repeats = torch.tensor(counts, device=device)
        owners = torch.repeat_interleave(
            torch.arange(len(counts), device=device), repeats, output_size=query_starts[-1]
        )
        shifts = torch.tensor(
            [start - first for start, first in zip(starts, query_starts, strict=False)], device=device
        )
        positions = torch.arange(query_starts[-1], device=device) + shifts[owners]
        return cls(
            query_starts=tuple(query_starts),
            starts=starts,
            block_tables=tables,
            positions=positions,
            blocks=tables[owners, positions // block_size],
            offsets=positions % block_size,
        )


class AttentionBackend(Protocol):
    """Causal attention with ALiBi and a sliding window, as configured, over a paged cache; softmax in float32."""

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> Attend:
        """Returns the attention of one step: it writes the new keys and values to `cache`, then attends."""
        ...
