"""The KV cache of a GPU gets what the weights and the largest steps leave, on a card that only counts."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import demo_settings
from torch import Tensor

from mpt_grpc.engine.computation import attention_backend
from mpt_grpc.engine.load import runner_on_gpu
from mpt_grpc.engine.parts import BLOCK_SIZE, Parts, resolve
from mpt_grpc.engine.sizing import LargestSteps
from mpt_grpc.errors import DeviceLostError, ModelError, SettingsError
from mpt_grpc.model.attention import AttentionMetadata
from mpt_grpc.model.graphs import Work
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.mpt import MPT, Attend
from mpt_grpc.model.runner import Runner
from mpt_grpc.settings import CacheSettings, SchedulerSettings, Settings

MIB = 1 << 20
CARD_BYTES, KEPT_BYTES, PASSING_BYTES = 600 * MIB, 3 * MIB, 5 * MIB


class Card:
    """A `GpuMemory` with room for the weights, after which steps keep and take as much as they are said to."""

    def __init__(self, *, passing_bytes: int = PASSING_BYTES) -> None:
        self.total_bytes = CARD_BYTES
        self.used_bytes = 0
        self._passing_bytes = passing_bytes

    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes

    def peak_bytes(self, work: Callable[[], object]) -> int:
        work()
        self.used_bytes += KEPT_BYTES
        return self._passing_bytes


class Seen:
    """An `AttentionBackend` that notes what steps there were."""

    def __init__(self, attend: Callable[[KVCache, AttentionMetadata], Attend]) -> None:
        self._attend = attend
        self.steps: list[AttentionMetadata] = []

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> Attend:
        self.steps.append(metadata)
        return self._attend(cache, metadata)


class Forgetting:
    """A `Recorder` that keeps nothing of the work but its results."""

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        return lambda: None, work()


class Disturbed:
    """An `AttentionBackend` whose results change a little with the number of sequences."""

    def __init__(self, bind: Callable[[KVCache, AttentionMetadata], Attend]) -> None:
        self._bind = bind

    def bind(self, cache: KVCache, metadata: AttentionMetadata) -> Attend:
        attend, factor = self._bind(cache, metadata), 1 + 1e-5 * len(metadata.starts)
        return lambda layer, query, key, value: attend(layer, query, key, value) * factor


def settings(**fields: Any) -> Settings:
    wanted = demo_settings()
    scheduler = SchedulerSettings(max_running_requests=8, max_step_tokens=96)
    return replace(wanted, cache=CacheSettings(memory_fraction=0.9, **fields), scheduler=scheduler)


def parts_of(wanted: Settings, card: Card) -> Parts:
    """Returns parts whose caches take memory of the card."""

    class Counted(Parts):
        def load_model(self, *, random: bool) -> MPT:
            card.used_bytes += 28 * MIB
            return super().load_model(random=random)

        def cache(self, num_blocks: int) -> KVCache:
            card.used_bytes += num_blocks * self.block_bytes
            return super().cache(num_blocks)

    parts = resolve(wanted)
    return Counted(**{name: getattr(parts, name) for name in parts.__dataclass_fields__})


def test_the_cache_fills_what_the_largest_steps_leave() -> None:
    card = Card()
    parts = parts_of(settings(), card)
    _, runner = runner_on_gpu(settings(), parts, card, random=False)
    trial_bytes = 64 * parts.block_bytes
    left = 0.9 * CARD_BYTES - 28 * MIB - KEPT_BYTES - PASSING_BYTES
    assert runner.num_blocks * parts.block_bytes == pytest.approx(left, abs=parts.block_bytes)
    # The trial's cache is gone; here its memory is never given back.
    assert card.used_bytes <= 0.9 * CARD_BYTES - PASSING_BYTES + trial_bytes


def test_the_trial_has_the_largest_steps() -> None:
    seen: list[Seen] = []
    card = Card()

    class Watched(Parts):
        def runner(self, model: MPT, cache: KVCache) -> Runner:
            backend = attention_backend(self.attention, self.config, self.weight_format)
            seen.append(Seen(backend.bind))
            return Runner(model, cache, seen[-1], self.weight_format.device, self.tokenizer.vocab_size)

    parts = resolve(settings())
    parts = Watched(**{name: getattr(parts, name) for name in parts.__dataclass_fields__})
    runner_on_gpu(settings(), parts, card, random=False)
    prompts, outputs, *_ = seen[0].steps
    assert len(prompts.token_ids) == 96
    assert prompts.starts[0] + 96 == parts.max_context_tokens
    assert len(outputs.token_ids) == len(outputs.starts) == 8
    assert set(outputs.starts) == {parts.max_context_tokens - 1}
    assert len(outputs.chosen) == 8


def test_the_trial_has_the_most_drafts() -> None:
    parts = resolve(settings())
    seen = Seen(attention_backend(parts.attention, parts.config, parts.weight_format).bind)
    runner = Runner(parts.load_model(random=False), parts.cache(64), seen, torch.device("cpu"), 100)
    LargestSteps(100, 4, 1000, 100, max_choices=17).run(runner, BLOCK_SIZE)
    LargestSteps(20, 4, 1000, 100, max_choices=17).run(runner, BLOCK_SIZE)
    assert [len(step.chosen) for step in seen.steps] == [1, 4 * 17, 1, 4 * 5]


def test_the_memory_of_the_trial_is_free_when_the_cache_is_made() -> None:
    caches: list[weakref.ref[Tensor]] = []

    class Recorded(Parts):
        def cache(self, num_blocks: int) -> KVCache:
            assert all(keys() is None for keys in caches)
            cache = super().cache(num_blocks)
            caches.append(weakref.ref(cache.keys))
            return cache

        def runner(self, model: MPT, cache: KVCache) -> Runner:
            backend = attention_backend(self.attention, self.config, self.weight_format)
            return Runner(model, cache, backend, self.weight_format.device, self.tokenizer.vocab_size, Forgetting())

    wanted = replace(settings(), scheduler=SchedulerSettings(max_running_requests=1, max_step_tokens=16))
    parts = resolve(wanted)
    parts = Recorded(**{name: getattr(parts, name) for name in parts.__dataclass_fields__})
    gc.disable()  # as if a collection came too late
    try:
        runner_on_gpu(wanted, parts, Card(), random=False)
    finally:
        gc.enable()
    assert len(caches) == 2


def test_a_given_size_is_not_tried() -> None:
    card = Card(passing_bytes=sys.maxsize)
    parts = parts_of(settings(kv_cache_bytes=10 * MIB), card)
    _, runner = runner_on_gpu(settings(kv_cache_bytes=10 * MIB), parts, card, random=False)
    assert runner.num_blocks == 10 * MIB // parts.block_bytes


def test_steps_that_leave_nothing_are_refused_with_what_to_lower() -> None:
    card = Card(passing_bytes=CARD_BYTES)
    with pytest.raises(ModelError, match=r"the largest steps do not fit .*: lower --max-step-tokens") as refused:
        runner_on_gpu(settings(), parts_of(settings(), card), card, random=False)
    assert "\n" not in str(refused.value)


def test_weights_that_do_not_fit_while_they_are_loaded_are_one_line() -> None:
    class Large(Parts):
        def load_model(self, *, random: bool) -> MPT:  # noqa: ARG002
            raise torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation")

    parts = resolve(settings())
    parts = Large(**{name: getattr(parts, name) for name in parts.__dataclass_fields__})
    with pytest.raises(ModelError) as refused:
        runner_on_gpu(settings(), parts, Card(), random=False)
    why = "the weights do not fit into the GPU's memory: CUDA out of memory."
    assert str(refused.value) == f"{why}: use --quantize int8 or a GPU with more memory"


def test_a_card_of_which_others_use_more_than_the_limit_has_nothing_free() -> None:
    card = Card()
    card.used_bytes = CARD_BYTES + MIB
    with pytest.raises(ModelError, match=r"only 0\.0 MiB of memory are free"):
        runner_on_gpu(settings(), parts_of(settings(), card), card, random=False)


def test_where_triton_fails_the_message_names_the_other_choice() -> None:
    pytest.importorskip("triton", reason="needs Triton, which is built for Linux")
    card = Card()
    parts = replace(parts_of(settings(), card), attention="triton")
    with pytest.raises(SettingsError, match=r"--attention: triton fails on this GPU \(.+\); use torch$"):
        runner_on_gpu(settings(), parts, card, random=False)


def test_where_triton_loses_the_gpu_the_message_names_the_other_choice() -> None:
    class Lost(Parts):
        def runner(self, model: MPT, cache: KVCache) -> Runner:  # noqa: ARG002
            raise DeviceLostError("the accelerator has failed: an illegal memory access")

    parts = replace(resolve(settings()), attention="triton")
    parts = Lost(**{name: getattr(parts, name) for name in parts.__dataclass_fields__})
    with pytest.raises(SettingsError, match=r"triton fails on this GPU \(.+: an illegal memory access\); use torch$"):
        runner_on_gpu(settings(), parts, Card(), random=False)


def test_bits_that_depend_on_the_batch_are_found_at_the_start() -> None:
    card = Card()
    wanted = replace(parts_of(settings(), card).weight_format, batch_invariant=True)
    runner_on_gpu(settings(), replace(parts_of(settings(), card), weight_format=wanted), card, random=False)

    class Crowded(Parts):
        def runner(self, model: MPT, cache: KVCache) -> Runner:
            device, vocab_size = self.weight_format.device, self.tokenizer.vocab_size
            backend = attention_backend(self.attention, self.config, self.weight_format)
            return Runner(model, cache, Disturbed(backend.bind), device, vocab_size)

    parts = resolve(settings())
    parts = Crowded(**{name: getattr(parts, name) for name in parts.__dataclass_fields__})
    with pytest.raises(SettingsError, match="--batch-invariant: on this GPU, a token's bits still depend on the batch"):
        runner_on_gpu(settings(), replace(parts, weight_format=wanted), Card(), random=False)


def test_a_limit_of_memory_is_refused_on_a_cpu() -> None:
    with pytest.raises(SettingsError, match="--memory-limit: limits the memory of a GPU; on a CPU, set --kv-cache"):
        resolve(settings(memory_limit_bytes=16 << 30))
    with pytest.raises(SettingsError, match="--memory-limit: must be above 0"):
        settings(memory_limit_bytes=0)


def test_a_request_may_fill_the_cache_and_no_more() -> None:
    parts = resolve(settings())
    assert parts.max_request_tokens(2) == 2 * BLOCK_SIZE
    assert parts.max_request_tokens(10**6) == parts.max_context_tokens
