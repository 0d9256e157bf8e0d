"""Builds an engine from settings: finds the checkpoint, resolves 'auto' values, loads the model, sizes the cache."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from mpt_grpc.checkpoint import Checkpoint, find_checkpoint
from mpt_grpc.engine.computation import (
    AttentionName,
    attention_backend,
    choose_attention,
    choose_cache_dtype,
    choose_weight_format,
)
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.fingerprint import fingerprint
from mpt_grpc.engine.memory import STEP_BYTES, MemoryNeeds, dtype_name, free_memory, why_too_large
from mpt_grpc.engine.prepare import Preparation
from mpt_grpc.engine.validation import RequestLimits
from mpt_grpc.errors import ModelError, SettingsError
from mpt_grpc.generation_config import generation_defaults
from mpt_grpc.limits import RANGES
from mpt_grpc.model.adapters import Adapter
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.graphs import CudaRecorder
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.mpt import MPT
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.model.weights import load_model, num_parameters, parameter_shapes, random_model
from mpt_grpc.request import GenerationDefaults
from mpt_grpc.schedule.block_pool import BlockPool
from mpt_grpc.schedule.scheduler import Scheduler, SchedulerLimits
from mpt_grpc.settings import CacheSettings, SchedulerSettings, Settings
from mpt_grpc.text.chat_template import ChatTemplate
from mpt_grpc.text.guards import Guard, load_guards
from mpt_grpc.text.template_sources import find_chat_template
from mpt_grpc.text.tokenizer import Tokenizer

Result = TypeVar("Result")
_log = logging.getLogger(__name__)

BLOCK_SIZE = 16
"""The number of tokens in a KV cache block."""
_DEFAULT_CPU_CACHE_BYTES = 1 << 30
_MIN_SUGGESTED_BLOCKS = 32
_SMALL_MODEL_BYTES = 32 << 20
_NUM_THREADS = torch.get_num_threads()
"""PyTorch's own choice: one for each core, or OMP_NUM_THREADS."""


@dataclass(frozen=True)
class LoadedModel:
    """Facts about the loaded model, as shown by GetModelInfo and at startup."""

    name: str
    config: MPTConfig
    defaults: GenerationDefaults
    num_parameters: int
    dtype: str
    device: str
    weight_bytes: int
    num_blocks: int
    cache_bytes: int
    fingerprint: str
    """What the tokens depend on besides the request; see `fingerprint.py`."""

    @property
    def cache_tokens(self) -> int:
        return self.num_blocks * BLOCK_SIZE


def load_engine(settings: Settings, *, loop: asyncio.AbstractEventLoop | None = None) -> tuple[Engine, LoadedModel]:
    """Loads the model and returns an engine that is not yet started. Raises ModelError or SettingsError.

    On a CPU, it sets the number of threads of PyTorch and of the compiled kernels for the whole process: one thread for
    a small model unless OMP_NUM_THREADS is set.
    """
    parts = _resolve(settings)
    block_bytes = KVCache.bytes_per_block(parts.config, BLOCK_SIZE, parts.cache_dtype)
    needs = _memory_needs(settings.cache, num_parameters(parts.config), block_bytes, parts.weight_format)
    num_blocks = needs.cache_bytes // block_bytes
    model, cache = _allocate(parts, needs, num_blocks, random=settings.model.load_format == "random")
    loaded = LoadedModel(
        name=parts.checkpoint.name,
        config=parts.config,
        defaults=parts.defaults,
        num_parameters=needs.num_parameters,
        dtype=dtype_name(parts.weight_format.stored_dtype),
        device=parts.weight_format.device.type,
        weight_bytes=needs.weight_bytes,
        num_blocks=num_blocks,
        cache_bytes=num_blocks * block_bytes,
        # Taken after the weights were read, which are then in the system's cache.
        fingerprint=fingerprint(
            settings.model,
            parts.checkpoint.folder,
            parts.weight_format,
            parts.cache_dtype,
            attention=parts.attention,
            defaults=parts.defaults,
            max_context_tokens=_max_context_tokens(parts, num_blocks),
            eos_token_ids=parts.tokenizer.eos_token_ids,
            chat_template=parts.chat_template.name,
            guards=settings.guards,
        ),
    )
    return _assemble(settings.scheduler, parts, model, cache, loop), loaded


@dataclass(frozen=True)
class _Parts:
    """What the settings and the checkpoint's small files determine, before any tensor is made."""

    checkpoint: Checkpoint
    config: MPTConfig
    adapters: Sequence[Adapter]
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    guards: Sequence[Guard]
    defaults: GenerationDefaults
    weight_format: WeightFormat
    attention: AttentionName
    cache_dtype: torch.dtype
    max_context_tokens: int


def _resolve(settings: Settings) -> _Parts:
    """Finds the checkpoint, reads its small files and resolves 'auto' values."""
    wanted = settings.model
    checkpoint = find_checkpoint(wanted.model, wanted.revision, weights=wanted.load_format != "random")
    folder = checkpoint.folder
    config = MPTConfig.from_file(folder / "config.json")
    shapes = parameter_shapes(config)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        why = f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's {config.vocab_size}"
        raise ModelError(f"{folder}: {why}: use the model's own")
    if not tokenizer.eos_token_ids:
        _log.warning(
            "%s specifies no end-of-sequence token: outputs end only at max_new_tokens or a stop string", folder
        )
    if tokenizer.omitted_tokens:
        _log.warning(
            "the tokenizer of %s adds %s to every text in transformers, but not here: write them in text prompts",
            folder,
            " ".join(tokenizer.omitted_tokens),
        )
    defaults = generation_defaults(folder) if wanted.generation_config == "model" else GenerationDefaults()
    max_context_tokens = wanted.max_context_tokens or config.max_seq_len
    if config.learned_positions and max_context_tokens > config.max_seq_len:
        why = f"{max_context_tokens} exceeds the model's {config.max_seq_len} positions"
        raise SettingsError(f"--max-context-tokens: {why}")
    weight_format = choose_weight_format(wanted, config)
    attention = choose_attention(wanted, config, weight_format)
    return _Parts(
        checkpoint=checkpoint,
        config=config,
        adapters=[Adapter.from_folder(adapter, shapes) for adapter in wanted.adapters],
        tokenizer=tokenizer,
        chat_template=find_chat_template(wanted.chat_template, folder, checkpoint.name),
        guards=load_guards(settings.guards),
        # As in transformers, a larger value keeps all tokens.
        defaults=replace(defaults, top_k=min(defaults.top_k, tokenizer.vocab_size)),
        weight_format=weight_format,
        attention=attention,
        cache_dtype=choose_cache_dtype(settings.cache, weight_format, attention),
        max_context_tokens=max_context_tokens,
    )


def _allocate(parts: _Parts, needs: MemoryNeeds, num_blocks: int, *, random: bool) -> tuple[MPT, KVCache]:
    """Loads the weights and makes the cache."""
    config, weight_format = parts.config, parts.weight_format

    def load_weights() -> MPT:
        if random:
            return random_model(config, weight_format)
        return load_model(parts.checkpoint.folder, config, weight_format, parts.adapters)

    if weight_format.device.type == "cpu":
        # Two threads wait for each other so often that one other busy process costs three quarters of the speed.
        is_small = needs.weight_bytes <= _SMALL_MODEL_BYTES and "OMP_NUM_THREADS" not in os.environ
        num_threads = 1 if is_small else _NUM_THREADS
        torch.set_num_threads(num_threads)
        if weight_format.kernels is not None:
            weight_format.kernels.set_threads(num_threads)
    model = _in_own_thread(load_weights)
    if weight_format.kernels is not None:
        torch.set_num_threads(1)  # what PyTorch still computes is little
    try:
        cache = _in_own_thread(lambda: KVCache(config, num_blocks, BLOCK_SIZE, parts.cache_dtype, weight_format.device))
        return model, cache
    except (RuntimeError, MemoryError) as error:
        raise SettingsError(f"--kv-cache: cannot allocate {needs.cache_bytes:,} bytes: {error}") from error


def _assemble(
    limits: SchedulerSettings,
    parts: _Parts,
    model: MPT,
    cache: KVCache,
    loop: asyncio.AbstractEventLoop | None,
) -> Engine:
    tokenizer, weight_format = parts.tokenizer, parts.weight_format
    attention = attention_backend(parts.attention, parts.config, weight_format)
    is_triton = parts.attention == "triton"
    recorder = CudaRecorder() if is_triton else None
    runner = Runner(model, cache, attention, weight_format.device, tokenizer.vocab_size, recorder)
    if is_triton:
        runner.warm_up()  # the server's own warm-up has a single token
    max_context_tokens = _max_context_tokens(parts, cache.num_blocks)
    max_in_flight = limits.max_running_requests + limits.max_waiting_requests
    request_limits = RequestLimits(
        tokenizer.vocab_size,
        max_context_tokens,
        parts.defaults.max_new_tokens,
        max_num_sequences=min(int(RANGES["sampling.num_sequences"].high), max_in_flight),
        max_token_bytes=tokenizer.max_token_bytes,
    )
    return Engine(
        Preparation(tokenizer, request_limits, parts.chat_template, parts.guards),
        Scheduler(
            SchedulerLimits(
                limits.max_running_requests,
                limits.max_step_tokens,
                max_context_tokens,
                limits.prefill_slowdown,
                speculates=limits.speculate == "ngram",
            ),
            BlockPool(cache.num_blocks, BLOCK_SIZE),
            tokenizer.eos_token_ids,
        ),
        runner,
        Sampler(tokenizer.vocab_size),
        max_in_flight=max_in_flight,
        loop=loop,
    )


def _max_context_tokens(parts: _Parts, num_blocks: int) -> int:
    """Returns the most tokens of a request. It may fill the whole cache; a longer one could never complete."""
    return min(parts.max_context_tokens, num_blocks * BLOCK_SIZE)


def _in_own_thread(make: Callable[[], Result]) -> Result:
    """Calls `make`, which creates tensors, in a short-lived thread.

    OpenMP keeps a set of workers for every thread that has computed, as long as that thread lives. With a second set
    besides the scheduler thread's, libgomp sees more threads than cores and stops all of them from spinning, which
    doubles the time of each step.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()


def _memory_needs(
    wanted: CacheSettings, num_parameters: int, block_bytes: int, weight_format: WeightFormat
) -> MemoryNeeds:
    """Returns what will be allocated, with at least one block of KV cache.

    Raises ModelError if memory cannot hold it, and SettingsError if --kv-cache cannot hold a block.
    """
    device, dtype = weight_format.device, weight_format.stored_dtype
    free_bytes, cache_bytes, reserved_bytes = free_memory(device), wanted.kv_cache_bytes, STEP_BYTES
    if cache_bytes is not None and cache_bytes < block_bytes:
        raise SettingsError(f"--kv-cache: {cache_bytes:,} bytes cannot hold a block, which takes {block_bytes:,}")
    if cache_bytes is None and device.type == "cpu":
        cache_bytes = max(_DEFAULT_CPU_CACHE_BYTES, block_bytes)
    elif cache_bytes is None:
        _, total_bytes = torch.cuda.mem_get_info(device)
        reserved_bytes = int(total_bytes * (1 - wanted.memory_fraction))
        cache_bytes = max(free_bytes - reserved_bytes - num_parameters * dtype.itemsize, block_bytes)
    needs = MemoryNeeds(num_parameters, dtype, cache_bytes, reserved_bytes)
    small_dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    min_cache_bytes = _MIN_SUGGESTED_BLOCKS * block_bytes
    too_large = why_too_large(needs, free_bytes, small_dtype=small_dtype, min_cache_bytes=min_cache_bytes)
    if too_large is not None:
        raise ModelError(too_large)
    return needs
