"""Helpers: tiny models of any architecture, their checkpoints in every published layout, and a way to run them."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mpt_grpc.model.attention import AttentionBackend
from mpt_grpc.model.attention.native_backend import NativeAttention
from mpt_grpc.model.attention.torch_backend import TorchAttention
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.graphs import Recorder, Work
from mpt_grpc.model.kv_cache import KVCache
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.mpt import MPT
from mpt_grpc.model.native import load_kernels
from mpt_grpc.model.runner import Runner, StepOutput
from mpt_grpc.model.weights import load_model
from mpt_grpc.request import SamplingParameters
from mpt_grpc.results import TokenLogprob
from mpt_grpc.step import PromptScoring, SamplingInputs, SequenceStep, StepPlan
from mpt_grpc.verification.reference import Array

CPU = torch.device("cpu")
KERNELS_BLOCK_SIZE = 16
"""The number of tokens of a block where the compiled kernels compute."""
GREEDY = SamplingParameters(temperature=0, seed=0)
Format = Literal["safetensors", "bin"]


def tiny_config(attn_config: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Returns the `config.json` of a model that runs in milliseconds, with the given fields overridden."""
    base = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "max_seq_len": 128}
    return {**base, "attn_config": dict(attn_config or {}), **fields}


def random_weights(config: Mapping[str, Any], *, qkv_std: float = 0.2) -> dict[str, Tensor]:
    """Returns float32 tensors with the published names, of a scale that gives logits several units apart."""
    attention = config["attn_config"]
    d_model, n_heads = config["d_model"], config["n_heads"]
    kind = attention.get("attn_type", "multihead_attention")
    n_kv_heads = {"multihead_attention": n_heads, "multiquery_attention": 1}.get(kind, attention.get("kv_n_heads"))
    d_kv = d_model // n_heads * n_kv_heads
    d_ffn = int(d_model * config.get("expansion_ratio", 4))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}

    has_biases, is_rms_norm = not config.get("no_bias", True), "rmsnorm" in config.get("norm_type", "").lower()
    qkv_bias = config.get("attention_bias")

    def add(name: str, *shape: int, std: float = 0.1, bias: bool = has_biases) -> None:
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * std + (1.0 if len(shape) == 1 else 0.0)
        if bias and not (is_rms_norm and len(shape) == 1):
            tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    add("transformer.wte", config["vocab_size"], d_model, bias=False)
    if config.get("learned_pos_emb", True) and not (attention.get("rope") or attention.get("alibi", True)):
        add("transformer.wpe", config["max_seq_len"], d_model, bias=False)
    for layer in range(config["n_layers"]):
        block = f"transformer.blocks.{layer}"
        add(f"{block}.norm_1", d_model)
        bias = has_biases if qkv_bias is None else qkv_bias
        add(f"{block}.attn.Wqkv", d_model + 2 * d_kv, d_model, std=qkv_std, bias=bias)
        if attention.get("qk_ln"):
            add(f"{block}.attn.q_ln", d_model)
            add(f"{block}.attn.k_ln", d_kv)
        add(f"{block}.attn.out_proj", d_model, d_model)
        add(f"{block}.norm_2", d_model)
        add(f"{block}.ffn.up_proj", d_ffn, d_model)
        if config.get("ffn_config", {}).get("ffn_type") == "mptglu":
            add(f"{block}.ffn.gate_proj", d_ffn, d_model)
        add(f"{block}.ffn.down_proj", d_model, d_ffn)
    add("transformer.norm_f", d_model)
    if not config.get("tie_word_embeddings", True):
        add("lm_head", config["vocab_size"], d_model, bias=False)
    return tensors


def make_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    *,
    shards: int = 1,
    format: Format = "safetensors",  # noqa: A002
) -> dict[str, Tensor]:
    """Writes `config.json` and `weights`, or random tensors, to `folder`; returns the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_weights(config) if weights is None else dict(weights)
    (folder / "config.json").write_text(json.dumps(config))
    stem = {"safetensors": "model", "bin": "pytorch_model"}[format]
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}.{format}" if shards == 1 else f"{stem}-{shard + 1:05}-of-{shards:05}.{format}"
        part = {
            name: tensors[name] for name in names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        }
        if format == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{stem}.{format}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def load(folder: Path, dtype: torch.dtype = torch.float32, *, quantize: bool = False) -> MPT:
    """Loads the checkpoint in `folder` with the code under test, for the kernels that MPT_GRPC_ISA selects."""
    weight_format = WeightFormat(dtype, CPU, load_kernels(), quantize)
    return load_model(folder, MPTConfig.from_file(folder / "config.json"), weight_format)


def as_arrays(weights: Mapping[str, Tensor]) -> dict[str, Array]:
    """Converts the weights to the arrays that the NumPy reference expects."""
    return {name: tensor.numpy().astype(np.float64) for name, tensor in weights.items()}


def random_tokens(count: int, vocab_size: int = 96, seed: int = 0) -> list[int]:
    """Returns `count` token IDs, the same for every call with the same seed."""
    return random.Random(seed).choices(range(vocab_size), k=count)


class Repeating:
    """A `Recorder` on the CPU: it replays work by calling it again, into the results of the first call."""

    def __init__(self, most_recordings: int = sys.maxsize) -> None:
        self.num_recordings = self.num_replays = 0
        self._most_recordings = most_recordings

    def record(self, work: Work) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        if self.num_recordings == self._most_recordings:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.num_recordings += 1
        results = work()

        def replay() -> None:
            self.num_replays += 1
            for old, new in zip(results, work(), strict=True):
                old.copy_(new)

        return replay, results


class Stepper:
    """Steps a Runner as a scheduler would, with shuffled block tables; block 0 belongs to an unrelated sequence."""

    def __init__(
        self,
        model: MPT,
        *,
        num_blocks: int = 256,
        block_size: int = 4,
        vocab_size: int | None = None,
        cache_dtype: torch.dtype | None = None,
        attention: AttentionBackend | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Without `attention`, the model's kernels attend, or PyTorch."""
        config, kernels = model.config, model.weight_format.kernels
        block_size = block_size if kernels is None else KERNELS_BLOCK_SIZE
        cache = KVCache(config, num_blocks, block_size, cache_dtype or model.weight_format.dtype, CPU)
        if attention is None:
            attention = NativeAttention(config, kernels) if kernels else TorchAttention(config, CPU)
        self._runner = Runner(model, cache, attention, CPU, vocab_size or config.vocab_size, recorder)
        self._block_size = block_size
        self._ids: dict[str, int] = {}
        self._new_ids = itertools.count()
        self._known: dict[str, int] = {}
        self._tables: dict[str, list[int]] = {}
        self._free = list(range(1, num_blocks))
        random.Random(0).shuffle(self._free)
        self._free.append(0)
        self.step({"unrelated": random_tokens(block_size, config.vocab_size, seed=1)})

    def step(
        self,
        chunks: Mapping[str, Sequence[int]],
        samples: Iterable[str] | None = None,
        pending: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Appends a chunk to each sequence in one step; returns the logits [vocab_size] of those named in `samples`.

        Without `samples`, the logits of all sequences are returned. A token ~i is the i-th of the `pending` ones.
        """
        sampling = list(chunks) if samples is None else [name for name in chunks if name in set(samples)]
        return dict(zip(sampling, self._run(chunks, sampling, {}, pending).logits, strict=True))

    def score(
        self, chunks: Mapping[str, Sequence[int]], scoring: Mapping[str, PromptScoring]
    ) -> dict[str, tuple[TokenLogprob, ...]]:
        """Appends a chunk to each sequence in one step, without sampling; returns what `scoring` requests, by name."""
        output = self._run(chunks, (), scoring)
        assert output.logits.shape[0] == 0
        names = {sequence_id: name for name, sequence_id in self._ids.items()}
        return {names[sequence_id]: logprobs for sequence_id, logprobs in output.prompt_logprobs.items()}

    def warm_up(self, max_sequences: int = 8, max_tokens: int = 512) -> None:
        """Warms the runner up."""
        self._runner.warm_up(max_sequences, max_tokens)

    def reserve(self, name: str, num_blocks: int) -> None:
        """Gives a sequence more blocks than it needs, as drafts do that turn out to be wrong."""
        self._tables[name] += [self._free.pop() for _ in range(num_blocks)]

    def release(self, name: str) -> None:
        """Ends a sequence; its blocks are the next to be reused."""
        del self._known[name], self._ids[name]
        self._free += self._tables.pop(name)

    def _run(
        self,
        chunks: Mapping[str, Sequence[int]],
        samples: Collection[str],
        scoring: Mapping[str, PromptScoring],
        pending: Tensor | None = None,
    ) -> StepOutput:
        steps = []
        for name, chunk in chunks.items():
            start, table = self._known.get(name, 0), self._tables.setdefault(name, [])
            self._known[name] = start + len(chunk)
            while len(table) * self._block_size < self._known[name]:
                table.append(self._free.pop())
            sequence_id = self._ids.setdefault(name, next(self._new_ids))
            inputs = (SamplingInputs(GREEDY),) if name in samples else ()
            steps.append(
                SequenceStep(sequence_id, name, tuple(chunk), start, tuple(table), inputs, scoring=scoring.get(name))
            )
        output = self._runner.run(StepPlan(tuple(steps)), pending)
        if not output.are_finite:
            raise FloatingPointError("the model's activations are not finite")  # as the sampler does
        return output


def run_prompt(
    model: MPT,
    token_ids: Sequence[int],
    chunk_sizes: Iterable[int],
    *,
    block_size: int = 4,
    cache_dtype: torch.dtype | None = None,
) -> Tensor:
    """Runs one sequence alone, in chunks of these sizes; returns the logits after each chunk, [chunks, vocab_size]."""
    num_blocks = len(token_ids) // block_size + 8
    stepper = Stepper(model, num_blocks=num_blocks, block_size=block_size, cache_dtype=cache_dtype)
    rows, first = [], 0
    for size in chunk_sizes:
        rows.append(stepper.step({"alone": token_ids[first : first + size]})["alone"])
        first += size
    assert first == len(token_ids)
    return torch.stack(rows)
