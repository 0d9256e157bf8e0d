"""Other names under which the fields of `config.json` and the tensors of MPT are published.

MosaicGPT, as MPT-1B is called in its files, is MPT with other names: the options of attention stand in `config.json`
itself, and the layers have other names. transformers accepts further names of some fields, and saves a model without
its output layer under names without `transformer.`. Trainers add the names of modules around the model, constants, and
heads that are not for text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MOSAIC_GPT = "mosaic_gpt"
"""The `model_type` of MosaicGPT."""
ALIASES: Mapping[str, str] = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "layer_norm_epsilon": "norm_eps",
}
"""Other names of fields in config.json."""

_MOSAIC_GPT_FIELDS: Mapping[str, str] = {
    "mlp_ratio": "expansion_ratio",
    "attn_qk_ln": "attn_config.qk_ln",
    "attn_clip_qkv": "attn_config.clip_qkv",
    **{
        name: f"attn_config.{name}"
        for name in "alibi alibi_bias_max attn_impl attn_pdrop attn_uses_sequence_id prefix_lm softmax_scale".split()
    },
}
_MOSAIC_GPT_TRAINING = frozenset(
    "emb_init_std emb_init_uniform_lim fan_mode init_div_is_residual init_gain init_nonlinearity init_std"
    " low_precision_layernorm param_init_fn".split()
)
_MULTIQUERY = "multiquery_attention"
_AROUND = re.compile(
    r"(?<![^.])(model|module|base_model|pretrained_model|_orig_mod|_forward_module|_fsdp_wrapped_module"
    r"|_checkpoint_wrapped_module)\."
)
"""The modules that Composer, PEFT, TRL, PyTorch, Lightning and DeepSpeed put around a model or a layer, which compute
nothing."""
_WITHOUT_EFFECT = re.compile(
    r"\.(rotary_embedding\..+|inv_freq|attn_bias|attn_mask|position_ids|_extra_state)$"  # constants and states
    r"|^v_head\."  # which estimates rewards in TRL
)
_ORIGINAL = "use the checkpoint from which they were made"
_FOREIGN: Mapping[str, str] = {
    r"\.(qweight|qzeros|scales|g_idx)$": f"weights quantized by GPTQ or AWQ are not supported; {_ORIGINAL}",
    r"\.SCB$|\.weight_format$|\.weight\.(absmax|quant_|nested_)": (
        f"weights quantized by bitsandbytes are not supported; {_ORIGINAL}"
    ),
    r"\.(weight|input|output)_(packed|shape|scale|scale_inv|zero_point|g_idx|global_scale)$": (
        f"weights quantized by compressed-tensors or to FP8 are not supported; {_ORIGINAL}"
    ),
    r"\.(base_layer|lora_\w+|ia3_l|modules_to_save|original_module)(\.|$)": (
        "an adapter is not merged; save the model as merge_and_unload returns it"
    ),
    r"\.attn\.(Wq|Wk|Wv|Wkv)\.": "separate weights of queries, keys and values are not supported",
}
"""Tensors by which a checkpoint is known that cannot be loaded, with the reason and a remedy."""
_WITHOUT_PREFIX = re.compile(r"(wte|wpe|blocks|norm_f|rotary_embedding)\.")
_MOSAIC_GPT_LAYERS: Mapping[str, str] = {
    ".ln_1.": ".norm_1.",
    ".ln_2.": ".norm_2.",
    ".ln_f.": ".norm_f.",
    ".mlp.mlp_up.": ".ffn.up_proj.",
    ".mlp.mlp_down.": ".ffn.down_proj.",
}


def renamed_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `config.json` by MPT's names. An alias remains only if it contradicts its field."""
    fields = _renamed_from_mosaic_gpt(raw) if raw.get("model_type") == MOSAIC_GPT else dict(raw)
    for alias, name in ALIASES.items():
        if fields.get(name) in (None, fields.get(alias)) and alias in fields:
            fields[name] = fields.pop(alias)
    return fields


def given_name(name: str, raw: Mapping[str, Any]) -> str:
    """Returns the name that a field, named by its path, has in `config.json`."""
    names = _MOSAIC_GPT_FIELDS if raw.get("model_type") == MOSAIC_GPT else {}
    others = (other for other, renamed in {**ALIASES, **names}.items() if renamed == name and other in raw)
    return name if name in raw else next(others, name)


def renamed_tensor(name: str) -> str:
    """Returns the name that a tensor has in MPT's published checkpoints; other tensors keep theirs."""
    name = _AROUND.sub("", name)
    if _WITHOUT_PREFIX.match(name):
        name = f"transformer.{name}"
    for old, new in _MOSAIC_GPT_LAYERS.items():
        name = name.replace(old, new)
    return name


def is_without_effect(name: str) -> bool:
    """Whether a tensor does not affect the logits: config.json determines it, or only training uses it."""
    return _WITHOUT_EFFECT.search(name) is not None


def why_foreign(name: str) -> str | None:
    """Returns why a checkpoint with this tensor cannot be loaded, if it is of a known kind."""
    return next((why for pattern, why in _FOREIGN.items() if re.search(pattern, name)), None)


def _renamed_from_mosaic_gpt(raw: Mapping[str, Any]) -> dict[str, Any]:
    nested = raw.get("attn_config") or {}
    if not isinstance(nested, Mapping):
        return dict(raw)
    # Unlike in MPT as transformers reads it, these two are off unless a file sets them.
    fields: dict[str, Any] = {"no_bias": False, "attn_config": {"alibi": False, **nested}}
    for name, value in raw.items():
        group, _, leaf = _MOSAIC_GPT_FIELDS.get(name, "").rpartition(".")
        if name == _MULTIQUERY and value is True:
            fields["attn_config"]["attn_type"] = _MULTIQUERY
        elif group:
            fields[group][leaf] = value
        elif name not in ("attn_config", *_MOSAIC_GPT_TRAINING):
            fields[leaf or name] = value
    return fields
