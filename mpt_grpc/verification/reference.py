"""A second implementation of MPT, in NumPy and float64, which also knows the fields that transformers ignores.

It shares no code with the server and has no cache, batches or blocks: it computes the logits at all positions of one
whole sequence. It reads the raw `config.json` itself. It follows llm-foundry's `modeling_mpt.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    if _has_learned_positions(config):
        x = x + weights["transformer.wpe.weight"][: len(token_ids)]
    for layer in range(config["n_layers"]):
        part = _Part(weights, f"transformer.blocks.{layer}.", config)
        x = x + _attention(part, config, attention, part.norm("norm_1", x))
        x = x + _feed_forward(part, config.get("ffn_config", {}), part.norm("norm_2", x))
    norm_f = _Part(weights, "transformer.", config)
    scale = config.get("logit_scale")
    if scale == "inv_sqrt_d_model":
        scale = 1 / math.sqrt(config["d_model"])
    head = embedding if config.get("tie_word_embeddings", True) else weights["lm_head.weight"]
    logits: Array = norm_f.norm("norm_f", x) @ head.T * (1.0 if scale is None else scale)
    cap = config.get("final_logit_softcapping")
    return logits if cap is None else cap * np.tanh(logits / cap)


def _has_learned_positions(config: Mapping[str, Any]) -> bool:
    attention = config.get("attn_config", {})
    rope = attention.get("rope", False)
    return config.get("learned_pos_emb", True) and not attention.get("alibi", not rope) and not rope


def _feed_forward(part: _Part, config: Mapping[str, Any], x: Array) -> Array:
    up = part.linear("ffn.up_proj", x)
    if config.get("ffn_type") == "mptglu":
        return part.linear("ffn.down_proj", _activate(config, part.linear("ffn.gate_proj", x)) * up)
    return part.linear("ffn.down_proj", _activate(config, up))


def _activate(config: Mapping[str, Any], x: Array) -> Array:
    options = config.get("ffn_act_fn") or {"name": "gelu"}
    if options.get("approximate") == "tanh":
        inner: Array = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        return 0.5 * x * (1 + inner)
    functions: dict[str, Callable[[Array], Array]] = {
        "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
        "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
    }
    return functions[options["name"]](x)


class _Part:
    """The weights whose names start with `prefix`."""

    def __init__(self, weights: Mapping[str, Array], prefix: str, config: Mapping[str, Any]) -> None:
        self._weights, self._prefix = weights, prefix
        self._epsilon = config.get("norm_eps", config.get("layer_norm_epsilon", 1e-5))
        self._is_rms_norm = "rmsnorm" in config.get("norm_type", "layernorm").lower()

    def linear(self, name: str, x: Array) -> Array:
        return x @ self._weights[f"{self._prefix}{name}.weight"].T + self._bias(name)

    def norm(self, name: str, x: Array) -> Array:
        centered = x if self._is_rms_norm else x - x.mean(-1, keepdims=True)
        deviation: Array = np.sqrt((centered**2).mean(-1, keepdims=True) + self._epsilon)
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
    if attention.get("rope"):
        q, k = _rotated(attention, q, head_dim), _rotated(attention, k, head_dim)
    scale = attention.get("softmax_scale")
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    has_alibi = attention.get("alibi", not attention.get("rope"))
    slopes = _slopes(n_heads, attention.get("alibi_bias_max", 8)) if has_alibi else [0.0] * n_heads
    window = attention.get("sliding_window_size", -1)

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
            if window != -1:
                scores[distance > window] = -np.inf
            powers = np.exp(scores - scores.max(-1, keepdims=True))
            context[first:end, own] = powers @ v[:end, shared] / powers.sum(-1, keepdims=True)
    return part.linear("attn.out_proj", context)


def _rotated(attention: Mapping[str, Any], x: Array, head_dim: int) -> Array:
    """Returns `x` [tokens, heads x head_dim], as complex numbers turned by angles proportional to their positions."""
    scaling = attention.get("rope_hf_config", {}) if attention.get("rope_impl") == "hf" else {}
    factor = scaling.get("factor", 1.0) if scaling.get("type") == "linear" else 1.0
    half = head_dim // 2
    heads = x.reshape(len(x), -1, 2, half)
    turns = attention.get("rope_theta", 10_000) ** (-2 * np.arange(half) / head_dim)
    angles = (np.arange(len(x)) / factor)[:, None, None] * turns
    turned = (heads[:, :, 0] + 1j * heads[:, :, 1]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=2).reshape(x.shape)


def _slopes(n_heads: int, bias_max: float) -> list[float]:
    """Returns 2^(-bias_max i/n) for i = 1 to n; if n is not a power of two, uses the next one, even i first."""
    power = 1
    while power < n_heads:
        power *= 2
    slopes = [2.0 ** (-bias_max * i / power) for i in range(1, power + 1)]
    return slopes if power == n_heads else (slopes[1::2] + slopes[0::2])[:n_heads]
