"""The architecture of an MPT model, read from its published `config.json`.

Every field that affects the computation is either implemented or rejected by name; fields that matter only in training
are ignored. The format is that of MosaicML's llm-foundry (`MPTConfig`), which transformers reads as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt_grpc.errors import ConfigError

# Metadata and training-only fields: their values do not affect the logits at inference. transformers writes its own
# fields, sampling defaults included, into every object of the file.
_IGNORED = frozenset(
    "_attn_implementation_autoset _name_or_path add_cross_attention architectures attn_impl attn_pdrop auto_map"
    " bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size"
    " decoder_start_token_id diversity_penalty do_sample dtype early_stopping emb_pdrop embedding_fraction"
    " encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty fc_type finetuning_task"
    " forced_bos_token_id forced_eos_token_id fused_qkv id2label init_config init_device initializer_range"
    " is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type name"
    " no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states"
    " output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty"
    " resid_pdrop return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params"
    " temperature tf_legacy_loss tie_encoder_decoder tokenizer_class tokenizer_name top_k top_p torch_dtype"
    " torchscript transformers_version typical_p use_bfloat16 use_cache verbose".split()
)

# Fields of which only some values are implemented; the first one is the default for an absent field.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "norm_type": ("low_precision_layernorm", "layernorm"),
    "tie_word_embeddings": (True,),
    "final_logit_softcapping": (None,),
    "block_overrides": (None,),
    "use_pad_tok_in_ffn": (True, False),
}
_FIXED_ATTENTION: Mapping[str, tuple[Any, ...]] = {
    "prefix_lm": (False,),
    "attn_uses_sequence_id": (False,),
    "qk_gn": (False,),
    "rope": (False,),
    "sliding_window_size": (-1,),
    "attn_logit_softcapping": (None,),
    "kv_dim": (None,),
    "reuse_kv_layer_idx": (None,),
}
_FIXED_FFN: Mapping[str, tuple[Any, ...]] = {"ffn_type": ("mptmlp",), "fc_type": ("torch", "te")}


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
    alibi: bool
    alibi_bias_max: float
    softmax_scale: float
    clip_qkv: float | None
    logit_scale: float | None
    qk_ln: bool
    bias: bool
    norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @classmethod
    def from_file(cls, path: Path) -> MPTConfig:
        """Reads a published `config.json`. Raises ConfigError if it cannot be read or is not implemented."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected a JSON object")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> MPTConfig:
        """Parses the content of `config.json`. Raises ConfigError naming the field and its value."""
        if raw.get("model_type") != "mpt":
            raise ConfigError(f"model_type: {raw.get('model_type')!r} is not supported; only 'mpt' is")
        top = _Fields("", raw)
        attention = _Fields("attn_config.", top.take("attn_config", {}) or {})
        ffn = _Fields("ffn_config.", top.take("ffn_config", {}) or {})
        for fields, fixed in ((top, _FIXED), (attention, _FIXED_ATTENTION), (ffn, _FIXED_FFN)):
            fields.check_fixed(fixed)
            fields.skip(_IGNORED)

        d_model = top.integer("d_model", 2048)
        n_heads = top.integer("n_heads", 16)
        if d_model % n_heads:
            raise ConfigError(f"n_heads: {n_heads} does not divide d_model {d_model}")
        alibi, learned = attention.boolean("alibi", True), top.boolean("learned_pos_emb", True)
        if not alibi and not learned:
            raise ConfigError("attn_config.alibi: False is only supported with learned_pos_emb: true")
        bias_max, scale = attention.number("alibi_bias_max"), attention.number("softmax_scale")
        config = cls(
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=_n_kv_heads(attention, n_heads),
            n_layers=top.integer("n_layers", 24),
            d_ffn=_d_ffn(top, d_model),
            vocab_size=top.integer("vocab_size", 50368),
            max_seq_len=top.integer("max_seq_len", 2048),
            alibi=alibi,
            alibi_bias_max=8.0 if bias_max is None else bias_max,
            softmax_scale=1 / math.sqrt(d_model // n_heads) if scale is None else scale,
            clip_qkv=attention.number("clip_qkv") or None,
            logit_scale=_logit_scale(top, d_model),
            qk_ln=attention.boolean("qk_ln", False),
            bias=not top.boolean("no_bias", True),
            norm_eps=_norm_eps(top),
        )
        for fields in (top, attention, ffn):
            fields.reject_rest()
        return config


class _Fields:
    """A JSON object whose fields must each be taken, skipped or rejected."""

    def __init__(self, prefix: str, raw: Any) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{prefix.rstrip('.')}: expected a JSON object, not {raw!r}")
        self._prefix = prefix
        self._rest = dict(raw)

    def take(self, name: str, default: Any = None) -> Any:
        return self._rest.pop(name, default)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "expected true or false")
        return value

    def integer(self, name: str, default: int) -> int:
        value = self.take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(name, value, "expected a positive integer")
        return value

    def number(self, name: str) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise self.error(name, value, "expected a non-negative number or null")
        return float(value)

    def check_fixed(self, fixed: Mapping[str, tuple[Any, ...]]) -> None:
        for name, allowed in fixed.items():
            value = self.take(name, allowed[0])
            if value not in allowed:
                raise self.error(name, value, f"only {' or '.join(map(repr, allowed))} is implemented")

    def skip(self, names: frozenset[str]) -> None:
        self._rest = {name: value for name, value in self._rest.items() if name not in names}

    def reject_rest(self) -> None:
        for name, value in self._rest.items():
            raise self.error(name, value, "this field is not implemented")

    def error(self, name: str, value: object, why: str) -> ConfigError:
        return ConfigError(f"{self._prefix}{name}: {value!r}: {why}")


def _n_kv_heads(attention: _Fields, n_heads: int) -> int:
    kind = attention.take("attn_type", "multihead_attention")
    stated = attention.take("kv_n_heads")
    implied = {"multihead_attention": n_heads, "multiquery_attention": 1, "grouped_query_attention": stated}
    if not isinstance(kind, str) or kind not in implied:
        raise attention.error("attn_type", kind, f"only {', '.join(implied)} are implemented")
    n_kv_heads = implied[kind]
    if not isinstance(n_kv_heads, int) or n_kv_heads < 1 or n_heads % n_kv_heads:
        raise attention.error("kv_n_heads", n_kv_heads, f"expected a divisor of n_heads {n_heads}")
    if stated is not None and stated != n_kv_heads:
        raise attention.error("kv_n_heads", stated, f"attn_type {kind!r} requires {n_kv_heads}")
    return n_kv_heads


def _d_ffn(top: _Fields, d_model: int) -> int:
    ratio = top.number("expansion_ratio")
    d_ffn = d_model * (4.0 if ratio is None else ratio)
    if d_ffn < 1 or d_ffn != int(d_ffn):
        raise top.error("expansion_ratio", ratio, f"multiplied by d_model {d_model} must be a positive integer")
    return int(d_ffn)


def _norm_eps(top: _Fields) -> float:
    """Returns the epsilon of layer norm, which llm-foundry calls `norm_eps` and transformers `layer_norm_epsilon`."""
    stated = [value for value in (top.number("norm_eps"), top.number("layer_norm_epsilon")) if value is not None]
    if len(set(stated)) > 1:
        raise ConfigError(f"layer_norm_epsilon: {stated[1]!r} differs from norm_eps {stated[0]!r}")
    return stated[0] if stated else 1e-5


def _logit_scale(top: _Fields, d_model: int) -> float | None:
    value = top.take("logit_scale")
    if value is None:
        return None
    if value == "inv_sqrt_d_model":
        return 1 / math.sqrt(d_model)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise top.error("logit_scale", value, "expected a number, 'inv_sqrt_d_model' or null")
