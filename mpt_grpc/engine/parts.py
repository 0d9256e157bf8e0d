"""What the settings and the checkpoint's small files determine: 'auto' values resolved, before any tensor is made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpt_grpc.checkpoint import Checkpoint, download_weights, find_checkpoint
from mpt_grpc.engine.computation import (
    AttentionName,
    attention_backend,
    choose_cache_dtype,
    choose_computation,
)
from mpt_grpc.errors import SettingsError
from mpt_grpc.generation_config import generation_defaults
from mpt_grpc.model.adapters import Adapter
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.graphs import CudaRecorder
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.mpt import MPT
from mpt_grpc.model.runner import Runner
from mpt_grpc.model.weights import load_model, parameter_shapes, random_model
from mpt_grpc.request import GenerationDefaults
from mpt_grpc.settings import Settings
from mpt_grpc.text.chat_template import ChatTemplate
from mpt_grpc.text.guards import Guard, load_guards
from mpt_grpc.text.template_sources import find_chat_template
from mpt_grpc.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

BLOCK_SIZE = 16
"""The number of tokens in a KV cache block."""


@dataclass(frozen=True)
class Parts:
    """The parts of an engine that are determined, and how the others are made of them."""

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

    @property
    def block_bytes(self) -> int:
        return KVCache.bytes_per_block(self.config, BLOCK_SIZE, self.cache_dtype)

    def max_request_tokens(self, num_blocks: int) -> int:
        """Returns the most tokens of a request. It may fill the whole cache; a longer one could never complete."""
        return min(self.max_context_tokens, num_blocks * BLOCK_SIZE)

    def load_model(self, *, random: bool) -> MPT:
        """Reads the weights, which are downloaded only now, or makes random ones."""
        if random:
            return random_model(self.config, self.weight_format)
        download_weights(self.checkpoint)
        return load_model(self.checkpoint.folder, self.config, self.weight_format, self.adapters)

    def cache(self, num_blocks: int) -> KVCache:
        """Raises SettingsError if there is no memory for it."""
        try:
            return KVCache(self.config, num_blocks, BLOCK_SIZE, self.cache_dtype, self.weight_format.device)
        except (RuntimeError, MemoryError) as error:
            num_bytes = num_blocks * self.block_bytes
            raise SettingsError(f"--kv-cache: cannot allocate {num_bytes:,} bytes: {error}") from error

    def runner(self, model: MPT, cache: KVCache) -> Runner:
        attention = attention_backend(self.attention, self.config, self.weight_format)
        recorder = CudaRecorder() if self.attention == "triton" else None
        device = self.weight_format.device
        return Runner(model, cache, attention, device, self.tokenizer.vocab_size, recorder)


def resolve(settings: Settings) -> Parts:
    """Finds the checkpoint, reads its small files and resolves 'auto' values."""
    wanted = settings.model
    checkpoint = find_checkpoint(wanted.model, wanted.revision)
    folder = checkpoint.folder
    config = MPTConfig.from_file(folder / "config.json")
    shapes = parameter_shapes(config)
    tokenizer = Tokenizer.from_folder(folder, config.vocab_size)
    _log_peculiarities(tokenizer, folder)
    defaults = generation_defaults(folder) if wanted.generation_config == "model" else GenerationDefaults()
    max_context_tokens = wanted.max_context_tokens or config.max_seq_len
    if config.learned_positions and max_context_tokens > config.max_seq_len:
        why = f"{max_context_tokens} exceeds the model's {config.max_seq_len} positions"
        raise SettingsError(f"--max-context-tokens: {why}")
    weight_format, attention = choose_computation(wanted, config)
    if settings.cache.memory_limit_bytes is not None and weight_format.device.type == "cpu":
        raise SettingsError("--memory-limit: limits the memory of a GPU; on a CPU, set --kv-cache")
    return Parts(
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


def _log_peculiarities(tokenizer: Tokenizer, folder: Path) -> None:
    """Logs what users of a tokenizer may not expect."""
    if tokenizer.extra_tokens:
        tokens = " ".join(tokenizer.extra_tokens)
        _log.warning("the model of %s lacks tokens of its tokenizer: prompts with %s are refused", folder, tokens)
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
