"""Builds an engine from settings: resolves them, loads the model, sizes the cache, and assembles the engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from mpt_grpc.engine.computation import AttentionName
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.fingerprint import fingerprint
from mpt_grpc.engine.memory import STEP_BYTES, CpuMemory, CudaMemory, GpuMemory, MemoryNeeds, dtype_name
from mpt_grpc.engine.parts import BLOCK_SIZE, Parts, resolve
from mpt_grpc.engine.prepare import Preparation
from mpt_grpc.engine.sizing import LargestSteps, bytes_left, memory_needs
from mpt_grpc.engine.validation import RequestLimits
from mpt_grpc.errors import ModelError, SettingsError
from mpt_grpc.limits import RANGES
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.sampler import Sampler
from mpt_grpc.model.weights import num_parameters
from mpt_grpc.request import GenerationDefaults
from mpt_grpc.schedule.block_pool import BlockPool
from mpt_grpc.schedule.drafts import MAX_DRAFTS
from mpt_grpc.schedule.scheduler import Scheduler, SchedulerLimits
from mpt_grpc.settings import SchedulerSettings, Settings

Result = TypeVar("Result")

_DEFAULT_CPU_CACHE_BYTES = 1 << 30
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
    parts = resolve(settings)
    is_random = settings.model.load_format == "random"
    if parts.weight_format.device.type == "cuda":
        needs, runner = runner_on_gpu(settings, parts, CudaMemory(settings.cache.memory_limit_bytes), random=is_random)
    else:
        needs, runner = runner_on_cpu(settings, parts, random=is_random)
    num_blocks = runner.num_blocks
    loaded = LoadedModel(
        name=parts.checkpoint.name,
        config=parts.config,
        defaults=parts.defaults,
        num_parameters=needs.num_parameters,
        dtype=dtype_name(parts.weight_format.stored_dtype),
        device=parts.weight_format.device.type,
        weight_bytes=needs.weight_bytes,
        num_blocks=num_blocks,
        cache_bytes=num_blocks * parts.block_bytes,
        # Taken after the weights were read, which are then in the system's cache.
        fingerprint=fingerprint(
            settings.model,
            parts.checkpoint.folder,
            parts.weight_format,
            parts.cache_dtype,
            attention=parts.attention,
            defaults=parts.defaults,
            max_context_tokens=parts.max_request_tokens(num_blocks),
            eos_token_ids=parts.tokenizer.eos_token_ids,
            chat_template=parts.chat_template.name,
            guards=settings.guards,
        ),
    )
    return _assemble(settings.scheduler, parts, runner, loop), loaded


def runner_on_cpu(settings: Settings, parts: Parts, *, random: bool) -> tuple[MemoryNeeds, Runner]:
    """Loads the weights and makes the cache."""
    weight_format = parts.weight_format
    needs = memory_needs(
        settings.cache,
        num_parameters(parts.config),
        parts.block_bytes,
        weight_format,
        CpuMemory(),
        default_cache_bytes=_DEFAULT_CPU_CACHE_BYTES,
    )
    # Two threads wait for each other so often that one other busy process costs three quarters of the speed.
    is_small = needs.weight_bytes <= _SMALL_MODEL_BYTES and "OMP_NUM_THREADS" not in os.environ
    num_threads = 1 if is_small else _NUM_THREADS
    torch.set_num_threads(num_threads)
    if weight_format.kernels is not None:
        weight_format.kernels.set_threads(num_threads)
    model = _in_own_thread(lambda: parts.load_model(random=random))
    if weight_format.kernels is not None:
        torch.set_num_threads(1)  # what PyTorch still computes is little
    cache = _in_own_thread(lambda: parts.cache(needs.cache_bytes // parts.block_bytes))
    return needs, parts.runner(model, cache)


def runner_on_gpu(settings: Settings, parts: Parts, memory: GpuMemory, *, random: bool) -> tuple[MemoryNeeds, Runner]:
    """Loads the weights, tries how much memory the largest steps take, and makes the cache of what is left."""
    wanted, limits = settings.cache, settings.scheduler
    reserved_bytes = int(memory.total_bytes * (1 - wanted.memory_fraction))
    needs = memory_needs(
        wanted,
        num_parameters(parts.config),
        parts.block_bytes,
        parts.weight_format,
        memory,
        reserved_bytes=reserved_bytes if wanted.kv_cache_bytes is None else STEP_BYTES,
    )
    cache_bytes = needs.cache_bytes
    with _fitting("the weights", "use --quantize int8 or a GPU with more memory"):
        model = parts.load_model(random=random)
    with _explained(parts.attention):
        if wanted.kv_cache_bytes is None:
            steps = LargestSteps(
                limits.max_step_tokens,
                limits.max_running_requests,
                parts.max_context_tokens,
                parts.tokenizer.vocab_size,
                max_choices=1 + MAX_DRAFTS if limits.speculate == "ngram" else 1,
            )
            make_runner = partial(parts.runner, model)
            cache_bytes = bytes_left(memory, reserved_bytes, parts.cache, make_runner, steps)
            if cache_bytes < parts.block_bytes:
                raise MemoryError("nothing is left for the KV cache")
        runner = parts.runner(model, parts.cache(cache_bytes // parts.block_bytes))
        runner.warm_up(limits.max_running_requests, parts.max_request_tokens(runner.num_blocks))
    if (
        parts.weight_format.batch_invariant
        and parts.max_request_tokens(runner.num_blocks) >= 16 * BLOCK_SIZE
        and not runner.gives_equal_bits()
    ):
        raise SettingsError("--batch-invariant: on this GPU, a token's bits still depend on the batch; omit it")
    return needs, runner


@contextmanager
def _explained(attention: AttentionName) -> Iterator[None]:
    """Raises ModelError or SettingsError, with a remedy, where a GPU cannot compute a step."""
    remedy = "lower --max-step-tokens, --max-context-tokens or --max-running-requests, or raise --memory-fraction"
    try:
        with _fitting("the largest steps", remedy):
            yield
    except (ModelError, SettingsError):
        raise
    except Exception as error:
        if attention != "triton":
            raise
        raise SettingsError(
            f"--attention: triton fails on this GPU ({type(error).__name__}: {_first_line(error)}); use torch"
        ) from error


@contextmanager
def _fitting(what: str, remedy: str) -> Iterator[None]:
    """Raises ModelError, with a remedy, where something does not fit."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        why = f"{what} do not fit into the GPU's memory: {_first_line(error)}"
        raise ModelError(f"{why}: {remedy}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _assemble(
    limits: SchedulerSettings,
    parts: Parts,
    runner: Runner,
    loop: asyncio.AbstractEventLoop | None,
) -> Engine:
    tokenizer = parts.tokenizer
    max_context_tokens = parts.max_request_tokens(runner.num_blocks)
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
            BlockPool(runner.num_blocks, BLOCK_SIZE),
            tokenizer.eos_token_ids,
        ),
        runner,
        Sampler(tokenizer.vocab_size, parts.weight_format.kernels),
        max_in_flight=max_in_flight,
        # A CPU has computed a step once it is launched; drafts of the next tokens depend on the last ones.
        runs_ahead=parts.weight_format.device.type != "cpu" and limits.speculate != "ngram",
        loop=loop,
    )


def _in_own_thread(make: Callable[[], Result]) -> Result:
    """Calls `make`, which creates tensors, in a short-lived thread.

    OpenMP keeps a set of workers for every thread that has computed, as long as that thread lives. With a second set
    besides the scheduler thread's, libgomp sees more threads than cores and stops all of them from spinning, which
    doubles the time of each step.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()
