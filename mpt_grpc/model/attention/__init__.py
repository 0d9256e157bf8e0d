"""Attention over the paged KV cache: the interface that backends implement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.mpt import Attend
from mpt_grpc.model.transfer import send_all
from mpt_grpc.step import StepPlan

Array = NDArray[np.int64]


@dataclass(frozen=True)
class AttentionMetadata:
    """Where a step's tokens are; sequence i has the tokens [query_starts[i], query_starts[i + 1]) of the step."""

    query_starts: tuple[int, ...]
    starts: tuple[int, ...]
    """The number of each sequence's tokens that were in the cache before the step."""
    token_ids: Tensor
    """[num_tokens], int64."""
    positions: Tensor
    """[num_tokens], int64: each token's position in its sequence."""
    blocks: Tensor
    """[num_tokens], int64: the block in which each token's key and value are stored."""
    offsets: Tensor
    """[num_tokens], int64: each token's position within its block."""
    block_tables: Tensor
    """[num_sequences, blocks of the longest sequence], int64; padded with any blocks."""
    query_starts_tensor: Tensor
    """[num_sequences + 1], int64: `query_starts` on the device."""
    starts_tensor: Tensor
    """[num_sequences], int64: `starts` on the device."""
    chosen: Tensor
    """[number of choices], int64: the tokens of the step after which a token is chosen, in the plan's order."""


class MetadataBuilder:
    """Makes the metadata of each step. Keeps the block tables as one array, written only where they change."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size, self._device = block_size, device
        self._tables: list[tuple[int, ...]] = []
        """The tables in the rows of `_array`."""
        self._array = np.zeros((0, 0), dtype=np.int64)

    def build(self, plan: StepPlan) -> AttentionMetadata:
        """Concatenates the plan's sequences, in the plan's order."""
        arrays = self.arrays(plan)
        *_, query_starts, starts, _ = arrays
        return AttentionMetadata(tuple(query_starts.tolist()), tuple(starts.tolist()), *send_all(arrays, self._device))

    def arrays(self, plan: StepPlan, num_blocks: int = 0) -> list[Array]:
        """Returns the tensors of the metadata as arrays, in the order of its fields, valid until the next call.

        The block tables have at least `num_blocks` columns.
        """
        steps = plan.sequences
        tables = self._block_tables([step.block_table for step in steps], num_blocks)
        starts = np.array([step.start for step in steps])
        counts = np.array([len(step.token_ids) for step in steps])
        query_starts = np.zeros(len(steps) + 1, dtype=np.int64)
        query_ends = counts.cumsum(out=query_starts[1:])
        owners = np.arange(len(steps)).repeat(counts)
        positions = np.arange(query_ends[-1]) + (starts - query_ends + counts).repeat(counts)
        rows = np.empty((4, len(positions)), dtype=np.int64)
        rows[0] = [token_id for step in steps for token_id in step.token_ids]
        rows[1] = positions
        rows[2] = tables[owners, positions // self.block_size]
        rows[3] = positions % self.block_size
        choices = np.array([len(step.choices) for step in steps])
        first_choices = query_ends - choices.cumsum()
        chosen = np.arange(choices.sum()) + first_choices.repeat(choices)
        return [*rows, tables, query_starts, starts, chosen]

    def _block_tables(self, tables: list[tuple[int, ...]], min_width: int) -> Array:
        width = max(min_width, *map(len, tables))
        if len(tables) > self._array.shape[0] or width > self._array.shape[1]:
            self._array = np.zeros((2 * len(tables), 2 * width), dtype=np.int64)
            self._tables = []
        for row, table in enumerate(tables):
            if row >= len(self._tables):
                self._tables.append(())
            if self._tables[row] is not table:
                self._array[row, : len(table)] = table
                self._tables[row] = table
        return self._array[: len(tables), :width]


class AttentionBackend(Protocol):
    """Causal attention with ALiBi and a sliding window, as configured, over a paged cache; softmax in float32."""

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> Attend:
        """Returns the attention of one step: it writes the new keys and values to `cache`, then attends."""
        ...
