"""A second implementation of MPT, in NumPy and float64: the oracle for config fields that transformers ignores.

It shares no code with mpt_grpc and has no cache, batches or blocks: it computes the logits at all positions of one
whole sequence. It reads the raw `config.json` itself. It follows llm-foundry's `modeling_mpt.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_QUERIES_AT_ONCE = 64
_erf = np.vectorize(math.erf, otypes=[np.float64])


def reference_logits(weights: Mapping[str, Array], config: Mapping[str, Any], token_ids: Sequence[int]) -> Array:
    """Returns logits [len(token_ids), vocab_size]. `weights` has the published names."""
    attention = config.get("attn_config", {})
    embedding = weights["transformer.wte.weight"]
    x = embedding[list(token_ids)]
    if not attention.get("alibi", True):
        x = x + weights["transformer.wpe.weight"][: len(token_ids)]
    for layer in range(config["n_layers"]):
        part = _Part(weights, f"transformer.blocks.{layer}.", config.get("layer_norm_epsilon", 1e-5))
        x = x + _attention(part, config, attention, part.norm("norm_1", x))
        hidden = part.linear("ffn.up_proj", part.norm("norm_2", x))
        x = x + part.linear("ffn.down_proj", hidden * 0.5 * (1 + _erf(hidden / math.sqrt(2))))
    norm_f = _Part(weights, "transformer.", config.get("layer_norm_epsilon", 1e-5))
    scale = config.get("logit_scale")
    if scale == "inv_sqrt_d_model":
        scale = 1 / math.sqrt(config["d_model"])
    return norm_f.norm("norm_f", x) @ embedding.T * (1.0 if scale is None else scale)


class _Part:
    """The weights whose names start with `prefix`."""

    def __init__(self, weights: Mapping[str, Array], prefix: str, epsilon: float) -> None:
        self._weights, self._prefix, self._epsilon = weights, prefix, epsilon

    def linear(self, name: str, x: Array) -> Array:
        return x @ self._weights[f"{self._prefix}{name}.weight"].T + self._bias(name)

    def norm(self, name: str, x: Array) -> Array:
        centered = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + self._epsilon)
        return centered / deviation * self._weights[f"{self._prefix}{name}.weight"] + self._bias(name)

    def _bias(self, name: str) -> Array | float:
        return self._weights.get(f"{self._prefix}{name}.bias", 0.0)


def _attention(part: _Part, config: Mapping[str, Any], attention: Mapping[str, Any], x: Array) -> Array:
    num_tokens, d_model = x.shape
    n_heads = config["n_heads"]
    head_dim = d_model // n_heads
    n_kv_heads = {
        "multihead_attention": n_heads,
        "multiquery_attention": 1,
        "grouped_query_attention": attention.get("kv_n_heads"),
    }[attention.get("attn_type", "multihead_attention")]
    qkv = part.linear("attn.Wqkv", x)
    if attention.get("clip_qkv"):
        qkv = np.clip(qkv, -attention["clip_qkv"], attention["clip_qkv"])
    q = qkv[:, :d_model]
    k = qkv[:, d_model : d_model + n_kv_heads * head_dim]
    v = qkv[:, d_model + n_kv_heads * head_dim :]
    if attention.get("qk_ln"):
        q, k = part.norm("attn.q_ln", q), part.norm("attn.k_ln", k)
    scale = attention.get("softmax_scale")
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    slopes = _slopes(n_heads, attention.get("alibi_bias_max", 8)) if attention.get("alibi", True) else [0.0] * n_heads

    context = np.empty((num_tokens, d_model))
    positions = np.arange(num_tokens)
    for head in range(n_heads):
        kv_head = head // (n_heads // n_kv_heads)
        own = slice(head * head_dim, (head + 1) * head_dim)
        shared = slice(kv_head * head_dim, (kv_head + 1) * head_dim)
        for first in range(0, num_tokens, _QUERIES_AT_ONCE):
            end = min(first + _QUERIES_AT_ONCE, num_tokens)
            distance = positions[first:end, None] - positions[None, :end]
            scores = q[first:end, own] @ k[:end, shared].T * scale - slopes[head] * distance
            scores[distance < 0] = -np.inf
            powers = np.exp(scores - scores.max(-1, keepdims=True))
            context[first:end, own] = powers @ v[:end, shared] / powers.sum(-1, keepdims=True)
    return part.linear("attn.out_proj", context)


def _slopes(n_heads: int, bias_max: float) -> list[float]:
    """Returns 2^(-bias_max i/n) for i = 1 to n; if n is not a power of two, uses the next one, even i first."""
    power = 1
    while power < n_heads:
        power *= 2
    slopes = [2.0 ** (-bias_max * i / power) for i in range(1, power + 1)]
    return slopes if power == n_heads else (slopes[1::2] + slopes[0::2])[:n_heads]
