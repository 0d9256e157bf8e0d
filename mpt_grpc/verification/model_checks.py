"""Compares the log probabilities that the engine serves with those of the references."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpt_grpc.checkpoint import Checkpoint
from mpt_grpc.engine.load import load_engine
from mpt_grpc.model.adapters import Adapter
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.published_names import MOSAIC_GPT, renamed_fields
from mpt_grpc.model.weights import parameter_shapes, stored_tensors
from mpt_grpc.model_files import read_json
from mpt_grpc.request import GenerationRequest, LogprobOptions, SamplingParameters, StoppingCriteria
from mpt_grpc.settings import CacheSettings, ModelSettings, Settings
from mpt_grpc.verification.check import Check
from mpt_grpc.verification.peer_config import peer_config
from mpt_grpc.verification.reference import Array, reference_logits
from mpt_grpc.verification.texts import PROMPT

_TOLERANCES = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.05}
"""The largest mean difference of log probabilities that rounding explains, by the data type of the computation."""
_MAX_PROMPT_TOKENS, _NUM_NEW_TOKENS = 128, 32
_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class _Served:
    """What the engine serves for one prompt, greedily."""

    token_ids: tuple[int, ...]
    """The prompt's and the output's."""
    num_prompt_tokens: int
    logprobs: Array
    """The log probability of each token but the first, [len(token_ids) - 1]."""
    vocab_size: int
    """The size of the tokenizer's vocabulary, over which the probabilities are normalized."""
    dtype: str
    num_parameters: int


@dataclass(frozen=True)
class _Scores:
    """A reference's log probabilities of the tokens that follow each token but the last, [len(token_ids) - 1]."""

    chosen: Array
    """The log probabilities of the tokens that do follow."""
    best: Array
    """The log probabilities of the most likely tokens."""

    @classmethod
    def from_logits(cls, logits: Array, served: _Served) -> _Scores:
        """Takes the logits [len(token_ids), rows of the embedding] at all positions."""
        logits = logits[:-1, : served.vocab_size]
        shifted = logits - logits.max(-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return cls(logprobs[np.arange(len(logprobs)), list(served.token_ids[1:])], logprobs.max(-1))


def model_checks(wanted: ModelSettings, checkpoint: Checkpoint) -> Iterator[Check]:
    """Yields the results in turn. Raises ModelError or SettingsError if the model cannot be loaded."""
    served = _served(wanted)
    yield Check("weights", "ok", f"{served.num_parameters:,} parameters, served in {served.dtype}")
    scores = _reference_scores(checkpoint.folder, wanted.adapters, served)
    yield _plausibility_check(served, scores)
    yield _comparison("float64 reference", served, scores)
    yield _transformers_check(checkpoint.folder, wanted.adapters, served)


def _served(wanted: ModelSettings) -> _Served:
    engine, model = load_engine(Settings(model=wanted, cache=CacheSettings(kv_cache_bytes=_CACHE_BYTES)))
    tokenizer, limits = engine.preparation.tokenizer, engine.preparation.limits
    num_new_tokens = min(_NUM_NEW_TOKENS, limits.max_context_tokens // 2)
    prompt = tokenizer.encode(PROMPT)[: min(_MAX_PROMPT_TOKENS, limits.max_context_tokens - num_new_tokens)]
    request = GenerationRequest(
        "verify",
        prompt,
        SamplingParameters(temperature=0),
        stopping=StoppingCriteria(max_new_tokens=num_new_tokens, ignore_eos=True),
        logprobs=LogprobOptions(prompt=True, output=True),
    )
    with engine:
        generation = engine.generate(request)
    logprobs = [token.logprob for token in (*generation.prompt_logprobs, *generation.outputs[0].logprobs)]
    return _Served(
        prompt + generation.token_ids,
        len(prompt),
        np.array(logprobs),
        tokenizer.vocab_size,
        model.dtype,
        model.num_parameters,
    )


def _reference_scores(folder: Path, adapters: Sequence[Path], served: _Served) -> _Scores:
    raw = renamed_fields(read_json(folder / "config.json") or {})
    shapes = parameter_shapes(MPTConfig.from_file(folder / "config.json"))
    weights = _Float64(stored_tensors(folder), [Adapter.from_folder(adapter, shapes) for adapter in adapters])
    return _Scores.from_logits(reference_logits(weights, raw, served.token_ids), served)


class _Float64(Mapping[str, Array]):
    """The checkpoint's tensors, each converted and merged when it is read, so that few are in memory at a time."""

    def __init__(self, tensors: Mapping[str, Tensor], adapters: Sequence[Adapter]) -> None:
        self._tensors = tensors
        self._adapters = adapters

    def __getitem__(self, name: str) -> Array:
        tensor = self._tensors[name].to(torch.float64)
        for adapter in self._adapters:
            tensor = adapter.merged(name, tensor)
        array: Array = tensor.numpy()
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _plausibility_check(served: _Served, scores: _Scores) -> Check:
    nats, chance = -float(scores.chosen[: served.num_prompt_tokens - 1].mean()), math.log(served.vocab_size)
    detail = f"{nats:.2f} nats for a token of plain English; chance is {chance:.2f}"
    if nats < chance:
        return Check("plausibility", "ok", detail)
    return Check("plausibility", "FAILED", f"{detail}: the weights do not fit config.json or the tokenizer")


def _transformers_check(folder: Path, adapters: Sequence[Path], served: _Served) -> Check:
    raw = read_json(folder / "config.json") or {}
    if raw["model_type"] == MOSAIC_GPT:
        return Check("transformers", "skipped", f"it does not know {MOSAIC_GPT}")
    if ignored := _ignored_by_transformers(raw, MPTConfig.from_file(folder / "config.json")):
        return Check("transformers", "skipped", f"it ignores {', '.join(ignored)}")
    if adapters and importlib.util.find_spec("peft") is None:
        return Check("transformers", "skipped", "merging adapters requires peft, which the extra 'verify' installs")
    from transformers import MptForCausalLM

    try:
        config = peer_config(raw)
        model = MptForCausalLM.from_pretrained(folder, config=config, dtype=getattr(torch, served.dtype))
    except Exception as error:  # whatever the files make it raise
        return Check("transformers", "skipped", f"it cannot load the checkpoint: {' '.join(str(error).split())}")
    for adapter in adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    with torch.inference_mode():
        logits = model(torch.tensor([served.token_ids])).logits[0].to(torch.float64).numpy()
    return _comparison("transformers", served, _Scores.from_logits(logits, served))


def _ignored_by_transformers(raw: Mapping[str, Any], config: MPTConfig) -> list[str]:
    """Returns the fields of config.json that change the computation here, but not in transformers' MptForCausalLM."""
    ignored = {
        "attn_config.alibi": not config.alibi,
        "attn_config.alibi_bias_max": config.alibi and config.alibi_bias_max != 8,
        "attn_config.kv_n_heads": config.n_kv_heads != config.n_heads,
        "attn_config.qk_ln": config.qk_ln,
        "attn_config.rope": config.rope is not None,
        "attn_config.sliding_window_size": config.sliding_window is not None,
        "expansion_ratio": config.d_ffn != 4 * config.d_model,
        "ffn_config": config.gated_ffn or config.activation != "gelu",
        "final_logit_softcapping": config.logit_softcap is not None,
        "logit_scale": config.logit_scale is not None,
        "no_bias": config.bias or config.qkv_bias,
        "norm_eps": config.norm_eps != raw.get("layer_norm_epsilon", 1e-5),
        "norm_type": config.rms_norm,
    }
    return [name for name, is_ignored in ignored.items() if is_ignored]


def _comparison(name: str, served: _Served, scores: _Scores) -> Check:
    differences = np.abs(served.logprobs - scores.chosen)
    first = served.num_prompt_tokens - 1
    shortfalls = scores.best[first:] - scores.chosen[first:]
    detail = (
        f"log probabilities differ by {differences.mean():.1g} on average, {differences.max():.1g} at most;"
        f" {int((shortfalls == 0).sum())} of {len(shortfalls)} greedy tokens are the most likely"
    )
    tolerance = _TOLERANCES[served.dtype]
    # Rounding may also choose between tokens that are nearly equally likely.
    is_same = differences.mean() <= tolerance and shortfalls.max() <= 10 * tolerance
    return Check(name, "same" if is_same else "DIFFERS", detail)
