"""The size of the KV cache: the requested one, a default on a CPU, or what the largest steps leave of a GPU's memory.

On a GPU these are tried with a small cache before the real one is made, so that memory does not run out later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch

from mpt_grpc.engine.memory import STEP_BYTES, GpuMemory, Memory, MemoryNeeds, why_too_large
from mpt_grpc.errors import ModelError, SettingsError
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.request import DecodingOptions, SamplingParameters
from mpt_grpc.settings import CacheSettings
from mpt_grpc.step import PromptScoring, SamplingInputs, SequenceStep, StepPlan

_MIN_SUGGESTED_BLOCKS = 32
_TRIAL_BLOCKS = 64
_NUM_TOP = 20
_COSTLIEST = SamplingInputs(
    SamplingParameters(temperature=1, seed=0, top_k=50, top_p=0.9, min_p=0.01, typical_p=0.9),
    DecodingOptions(frequency_penalty=1),
    output_token_ids=(0,),
    num_top_logprobs=_NUM_TOP,
)


def memory_needs(
    wanted: CacheSettings,
    num_parameters: int,
    block_bytes: int,
    weight_format: WeightFormat,
    memory: Memory,
    *,
    reserved_bytes: int = STEP_BYTES,
    default_cache_bytes: int | None = None,
) -> MemoryNeeds:
    """Returns the memory that will be allocated, with at least one block of KV cache.

    reserved_bytes: what must stay free.
    default_cache_bytes: the size of the cache if none is wanted; None is an estimate of what is left.

    Raises ModelError if memory cannot hold it, and SettingsError if --kv-cache cannot hold a block.
    """
    dtype = weight_format.stored_dtype
    free_bytes, cache_bytes = max(0, memory.free_bytes()), wanted.kv_cache_bytes
    if cache_bytes is not None and cache_bytes < block_bytes:
        raise SettingsError(f"--kv-cache: {cache_bytes:,} bytes cannot hold a block, which takes {block_bytes:,}")
    if cache_bytes is None:
        left_bytes = free_bytes - reserved_bytes - num_parameters * dtype.itemsize
        cache_bytes = max(left_bytes if default_cache_bytes is None else default_cache_bytes, block_bytes)
    needs = MemoryNeeds(num_parameters, dtype, cache_bytes, reserved_bytes)
    small_dtype = torch.bfloat16 if weight_format.device.type == "cpu" else torch.float16
    min_cache_bytes = _MIN_SUGGESTED_BLOCKS * block_bytes
    too_large = why_too_large(needs, free_bytes, small_dtype=small_dtype, min_cache_bytes=min_cache_bytes)
    if too_large is not None:
        raise ModelError(too_large)
    return needs


@dataclass(frozen=True)
class LargestSteps:
    """The limits of a step."""

    max_step_tokens: int
    max_sequences: int
    max_context_tokens: int
    vocab_size: int
    """The tokenizer's."""
    max_choices: int
    """The most tokens that are chosen for one sequence: more than one with drafts."""

    def run(self, runner: Runner, block_size: int) -> None:
        """Computes steps that take as much memory as any can, on a cache of `_TRIAL_BLOCKS`, whose blocks repeat."""
        sampler = Sampler(self.vocab_size)
        for plan in (StepPlan(tuple(self._prompts(block_size))), StepPlan(tuple(self._outputs(block_size)))):
            with suppress(FloatingPointError):  # the server's warm-up reports weights that are not finite
                output = runner.run(plan)
                sampler.sample(output.logits, plan.sequences, are_finite=output.are_finite)

    def _prompts(self, block_size: int) -> Iterator[SequenceStep]:
        """Yields the ends of prompts that fill the context, with the log probabilities of all their tokens."""
        tokens_left = self.max_step_tokens
        while tokens_left:
            count = min(tokens_left, self.max_context_tokens)
            scoring = PromptScoring(0, (0,) * (count - 1), _NUM_TOP) if count > 1 else None
            yield self._sequence(tokens_left, count, 1, block_size, scoring)
            tokens_left -= count

    def _outputs(self, block_size: int) -> Iterator[SequenceStep]:
        num = min(self.max_choices, self.max_step_tokens // self.max_sequences, self.max_context_tokens)
        return (self._sequence(number, num, num, block_size, None) for number in range(self.max_sequences))

    def _sequence(
        self, number: int, count: int, num_choices: int, block_size: int, scoring: PromptScoring | None
    ) -> SequenceStep:
        table = tuple(block % _TRIAL_BLOCKS for block in range(-(-self.max_context_tokens // block_size)))
        inputs = (_COSTLIEST,) * num_choices
        start = self.max_context_tokens - count
        return SequenceStep(number, "trial", (0,) * count, start, table, inputs, scoring=scoring)


def bytes_left(
    memory: GpuMemory,
    reserved_bytes: int,
    make_cache: Callable[[int], KVCache],
    make_runner: Callable[[KVCache], Runner],
    steps: LargestSteps,
) -> int:
    """Returns the number of bytes left for the KV cache once the weights are loaded, which may be negative.

    The memory that the runner keeps, as for recorded steps, and that the largest steps take for a moment is measured.
    """
    free_bytes = memory.free_bytes()
    cache = make_cache(_TRIAL_BLOCKS)
    runner = make_runner(cache)
    passing_bytes = memory.peak_bytes(lambda: steps.run(runner, cache.block_size))
    runner.warm_up(steps.max_sequences, steps.max_context_tokens)
    cache_bytes = 2 * cache.keys.nbytes
    kept_bytes = free_bytes - memory.free_bytes() - cache_bytes
    return free_bytes - max(0, kept_bytes) - passing_bytes - reserved_bytes
