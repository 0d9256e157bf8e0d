"""Decoding steps as CUDA graphs: recorded for each size at the start, then replayed by one call instead of hundreds.

A step is padded to the next size by repeating its last sequence, which writes the same values to the same places again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mpt_grpc.model.attention import Array, AttentionMetadata, MetadataBuilder
from mpt_grpc.model.attention.tiling import SPLIT_KEYS, power_of_two
from mpt_grpc.model.transfer import fill_in, flattened, overwrite, send, split_like
from mpt_grpc.step import SequenceStep, StepPlan

_log = logging.getLogger(__name__)

Work = Callable[[], tuple[Tensor, ...]]
Compute = Callable[[AttentionMetadata], tuple[Tensor, ...]]
"""Queues a step without waiting for anything; returns one row for each sequence, and what follows from all of them."""


class Recorder(Protocol):
    """A device that can record what is queued on it."""

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """Runs `work` and records it; returns what replays it, and its results, which each replay overwrites.

        Raises RuntimeError if the device cannot record it.
        """
        ...


class CudaRecorder:
    """A `Recorder` of CUDA graphs, which share their memory: one is replayed at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: cuBLAS keeps memory for each stream that it has computed on.
        self._stream = torch.cuda.Stream()

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        # Kernels are compiled and loaded by the first run, which cannot be recorded.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        current = torch.cuda.current_stream()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                results = work()
        except RuntimeError:
            # PyTorch leaves the stream and its allocator as they are where CUDA refuses what was to be recorded.
            torch.cuda.set_stream(current)
            with suppress(RuntimeError):  # nothing is left to end otherwise
                torch._C._cuda_endAllocateToPool(current.device_index, self._pool)
            raise
        graph.replay()
        return graph.replay, results


@dataclass(frozen=True)
class _Recording:
    inputs: Tensor
    """The arrays of a step's metadata, one after the other, int64."""
    replay: Callable[[], None]
    results: tuple[Tensor, ...]


class DecodeGraphs:
    """Runs steps in which each sequence computes and chooses one token."""

    def __init__(self, recorder: Recorder, metadata: MetadataBuilder, device: torch.device) -> None:
        self._recorder, self._metadata, self._device = recorder, metadata, device
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._results: tuple[Tensor, ...] | None = None
        """The results of the largest steps, whose memory the results of the others share."""

    def record(self, compute: Compute, max_sequences: int, max_tokens: int) -> None:
        """Records the steps of up to `max_sequences` sequences with at most `max_tokens` tokens each.

        They write to the cache's first block. If the device cannot record, or not all of them, the others are computed.
        """
        sizes = sorted({_padded(num) for num in range(1, max_sequences + 1)}, reverse=True)
        most_splits = _num_splits(max_tokens)
        # The largest first: the memory that it takes suffices for the others.
        for size in sizes:
            for splits in reversed([1 << power for power in range(most_splits.bit_length())]):
                try:
                    self._recordings[size, splits] = self._record(compute, size, splits)
                except RuntimeError as error:
                    why = next(iter(str(error).splitlines()), "")
                    _log.warning("some decoding steps are computed without CUDA graphs, which is slower: %s", why)
                    return

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> tuple[Tensor, ...] | None:
        """Returns what `Compute` does, valid until the next step; None if the step must be computed without a graph.

        `chosen` has the tokens that are pending in the plan.
        """
        if not all(map(_decodes, plan.sequences)):
            return None
        num_sequences = len(plan.sequences)
        # A table may have more blocks than the step needs: some were for drafts that were wrong.
        longest = max(len(sequence.block_table) for sequence in plan.sequences) * self._metadata.block_size
        size, splits = _padded(num_sequences), _num_splits(longest)
        if (recording := self._recordings.get((size, splits))) is None:
            return None
        padding = plan.sequences[-1:] * (size - num_sequences)
        overwrite(recording.inputs, flattened(self._arrays(plan.sequences + padding, splits)))
        if chosen is not None:
            fill_in(recording.inputs[:size], chosen)  # the tokens come first
        recording.replay()
        rows, *rest = recording.results
        return rows[:num_sequences], *rest

    def _record(self, compute: Compute, size: int, splits: int) -> _Recording:
        sequence = SequenceStep(-1, "recorded", (0,), 0, (0,), ())
        arrays = self._arrays((sequence,) * size, splits)
        arrays[-1] = np.arange(size)  # a token is chosen after each
        inputs = send(flattened(arrays), self._device)
        # The lengths stand for all that fit into as many splits.
        longest = (splits * SPLIT_KEYS - 1,) * size
        metadata = AttentionMetadata(tuple(range(size + 1)), longest, *split_like(inputs, arrays))
        replay, results = self._recorder.record(lambda: self._shared(compute(metadata)))
        self._results = self._results or results
        return _Recording(inputs, replay, results)

    def _shared(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._results is None:
            return results
        pairs = zip(self._results, results, strict=True)
        return tuple((shared[: len(result)] if result.ndim else shared).copy_(result) for shared, result in pairs)

    def _arrays(self, sequences: tuple[SequenceStep, ...], splits: int) -> list[Array]:
        return self._metadata.arrays(StepPlan(sequences), num_blocks=splits * SPLIT_KEYS // self._metadata.block_size)


def _decodes(sequence: SequenceStep) -> bool:
    return len(sequence.token_ids) == len(sequence.choices) == 1 and sequence.scoring is None


def _num_splits(num_tokens: int) -> int:
    """Returns the number of splits in the recording of a step whose longest block table holds `num_tokens` tokens."""
    return power_of_two(-(-num_tokens // SPLIT_KEYS))


def _padded(num_sequences: int) -> int:
    """Returns the size at which a step is recorded: a power of two, or from 8 on a multiple of 8."""
    return power_of_two(num_sequences) if num_sequences < 8 else -(-num_sequences // 8) * 8
