"""The architecture of an MPT model, read from its published `config.json`.

The format is that of MosaicML's llm-foundry (`MPTConfig`), which transformers reads as well. `config_fields.py` lists
the fields; those that change the computation are implemented or refused, all at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt_grpc.errors import ConfigError, ModelError
from mpt_grpc.model.config_fields import LIMITED, READ, activation, is_ignored
from mpt_grpc.model.fields import MAX_SIZE, Fields, is_number
from mpt_grpc.model.published_names import ALIASES, MOSAIC_GPT, given_name, renamed_fields
from mpt_grpc.model_files import read_json

_MAX_CONTEXT_TOKENS = 1 << 31
_MAX_LAYERS = 1 << 10
"""More than any model has; describing the parameters of each layer takes time and memory."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings."""

    theta: float
    """The base of the wavelengths."""
    factor: float
    """The number by which positions are divided."""


@dataclass(frozen=True)
class MPTConfig:
    """The parameters of the forward pass. Sizes are in elements, `max_seq_len` is in tokens."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    d_ffn: int
    vocab_size: int
    max_seq_len: int
    learned_positions: bool
    alibi: bool
    alibi_bias_max: float
    rope: Rope | None
    sliding_window: int | None
    """How many earlier tokens a token attends to; None for all."""
    softmax_scale: float
    clip_qkv: float | None
    qk_ln: bool
    rms_norm: bool
    """Whether the normalization is RMSNorm instead of layer norm."""
    norm_eps: float
    bias: bool
    """Whether linear layers have biases, except for `qkv_bias`; and whether layer norms have."""
    qkv_bias: bool
    gated_ffn: bool
    activation: str
    """The feed-forward layers' activation, one of `config_fields.ACTIVATIONS`."""
    tied_head: bool
    """Whether the embedding is also the output layer."""
    logit_scale: float | None
    logit_softcap: float | None

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def from_file(cls, path: Path) -> MPTConfig:
        """Reads a published `config.json`. Raises ModelError, or ConfigError if it is not supported."""
        raw = read_json(path)
        if raw is None:
            raise ModelError(f"{path}: not found")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MPTConfig:
        """Parses the content of `config.json`. Raises ConfigError with every field that is not supported."""
        if raw.get("model_type") not in ("mpt", MOSAIC_GPT):
            why = f"is not supported; only 'mpt' and {MOSAIC_GPT!r} are"
            raise ConfigError(f"config.json: model_type: {raw.get('model_type')!r} {why}")
        fields = _fields(raw)
        fields.check_limited(LIMITED)
        d_model, n_heads = fields.size("d_model", 2048), fields.size("n_heads", 16)
        if d_model % n_heads:
            fields.refuse("n_heads", n_heads, f"does not divide d_model, which is {d_model}")
        head_dim = max(1, d_model // n_heads)
        if fields.get("head_dim") not in (None, head_dim):
            fields.refuse(
                "head_dim", fields.get("head_dim"), f"only d_model / n_heads, which is {head_dim}, is supported"
            )
        no_bias = fields.boolean("no_bias", True)
        rope = _rope(fields, head_dim)
        alibi = fields.boolean("attn_config.alibi", rope is None)
        learned_positions = fields.boolean("learned_pos_emb", True)
        bias_max = fields.number("attn_config.alibi_bias_max")
        if raw["model_type"] == MOSAIC_GPT and alibi and n_heads.bit_count() != 1:
            fields.refuse("n_heads", n_heads, "MosaicGPT had other linear biases unless this is a power of two")
        softmax_scale = fields.number("attn_config.softmax_scale")
        norm_eps = fields.number("norm_eps")
        config = cls(
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=_n_kv_heads(fields, n_heads),
            n_layers=fields.size("n_layers", 24, _MAX_LAYERS),
            d_ffn=_d_ffn(fields, d_model),
            vocab_size=fields.size("vocab_size", 50368),
            max_seq_len=fields.size("max_seq_len", 2048, _MAX_CONTEXT_TOKENS),
            learned_positions=learned_positions and not alibi and rope is None,
            alibi=alibi,
            alibi_bias_max=8.0 if bias_max is None else bias_max,
            rope=rope,
            sliding_window=_sliding_window(fields),
            softmax_scale=1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale,
            clip_qkv=fields.number("attn_config.clip_qkv") or None,
            qk_ln=fields.boolean("attn_config.qk_ln", False),
            rms_norm=str(fields.get("norm_type")).lower().endswith("rmsnorm"),
            norm_eps=1e-5 if norm_eps is None else norm_eps,
            bias=not no_bias,
            qkv_bias=not no_bias if fields.get("attention_bias") is None else fields.boolean("attention_bias", False),
            gated_ffn=str(fields.get("ffn_config.ffn_type")).lower() == "mptglu",
            activation=activation(fields.get("ffn_config.ffn_act_fn")) or "gelu",
            tied_head=fields.boolean("tie_word_embeddings", True),
            logit_scale=_logit_scale(fields, d_model),
            logit_softcap=fields.number("final_logit_softcapping") or None,
        )
        fields.check_unknown(READ.keys(), LIMITED, is_ignored)
        if fields.obstacles:
            raise ConfigError(f"config.json: {'; '.join(fields.obstacles)}")
        return config


def _fields(raw: Mapping[str, Any]) -> Fields:
    """Returns the fields by their paths, with a dot between an object and its fields."""
    groups, renamed = ("attn_config", "ffn_config"), renamed_fields(raw)
    others = {name: value for name, value in renamed.items() if name not in groups}
    fields = Fields(others, lambda name: given_name(name, raw))
    for group in groups:
        content = {} if renamed.get(group) is None else renamed[group]
        if isinstance(content, Mapping):
            fields.values |= {f"{group}.{name}": value for name, value in content.items()}
        else:
            fields.obstacles.append(f"{group}: expected a JSON object, not {content!r}")
    for alias, name in ALIASES.items():
        if (value := fields.values.pop(alias, None)) is not None:
            fields.refuse(alias, value, f"differs from {name}, which is {fields.get(name)!r}")
    return fields


def _n_kv_heads(fields: Fields, n_heads: int) -> int:
    kind, stated = fields.get("attn_config.attn_type", "multihead_attention"), fields.get("attn_config.kv_n_heads")
    implied = {"multihead_attention": n_heads, "multiquery_attention": 1, "grouped_query_attention": stated}
    if not isinstance(kind, str) or kind not in implied:
        fields.refuse("attn_config.attn_type", kind, f"supported: {', '.join(implied)}")
        return n_heads
    n_kv_heads = implied[kind]
    if not is_number(n_kv_heads, 1) or n_kv_heads % 1 or n_heads % n_kv_heads:
        fields.refuse("attn_config.kv_n_heads", n_kv_heads, f"expected a divisor of n_heads, which is {n_heads}")
        return n_heads
    if stated is not None and stated != n_kv_heads:
        fields.refuse("attn_config.kv_n_heads", stated, f"attn_type {kind!r} requires {n_kv_heads}")
    return int(n_kv_heads)


def _rope(fields: Fields, head_dim: int) -> Rope | None:
    """Returns the rotary position embeddings, whose two implementations in llm-foundry compute the same."""
    if not fields.boolean("attn_config.rope", False):
        return None
    theta = fields.number("attn_config.rope_theta")
    theta = 10_000.0 if theta is None else theta
    if theta < 1:
        fields.refuse("attn_config.rope_theta", theta, "expected a number from 1")
    if head_dim % 2:
        fields.refuse("attn_config.rope", True, f"needs an even width of an attention head, not {head_dim}")
    implementation = fields.get("attn_config.rope_impl", "dail")
    if implementation not in ("dail", "hf"):
        fields.refuse("attn_config.rope_impl", implementation, "supported: dail or hf")
        return None
    name = f"attn_config.rope_{implementation}_config"
    plain = "original" if implementation == "dail" else "no_scaling"
    options = fields.get(name) or {"type": plain}
    if isinstance(options, Mapping):
        kind, factor = options.get("type", plain), options.get("factor", 1.0)
        if kind == plain:
            return Rope(theta, factor=1.0)
        if implementation == "hf" and kind == "linear" and is_number(factor, 1):
            return Rope(theta, float(factor))
    supported = "type original" if implementation == "dail" else "type no_scaling, or linear with a factor from 1"
    fields.refuse(name, options, f"would need other rotary position embeddings; supported: {supported}")
    return None


def _sliding_window(fields: Fields) -> int | None:
    size = fields.get("attn_config.sliding_window_size")
    if size is None or size == -1:
        return None
    return fields.size("attn_config.sliding_window_size", 1, _MAX_CONTEXT_TOKENS)


def _d_ffn(fields: Fields, d_model: int) -> int:
    if fields.get("ffn_config.ffn_hidden_size") is not None:
        return fields.size("ffn_config.ffn_hidden_size", 1)
    ratio = fields.number("expansion_ratio")
    d_ffn = d_model * (4.0 if ratio is None else ratio)
    if not 1 <= d_ffn <= MAX_SIZE or d_ffn != int(d_ffn):
        why = f"multiplied by d_model, which is {d_model}, must be an integer from 1 to {MAX_SIZE}"
        fields.refuse("expansion_ratio", ratio, why)
        return d_model
    return int(d_ffn)


def _logit_scale(fields: Fields, d_model: int) -> float | None:
    value = fields.get("logit_scale")
    if value is None:
        return None
    if value == "inv_sqrt_d_model":
        return 1 / math.sqrt(d_model)
    if is_number(value):
        return float(value)
    fields.refuse("logit_scale", value, "expected a number, 'inv_sqrt_d_model' or null")
    return None
