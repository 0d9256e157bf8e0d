"""Every field of `config.json` that is known, and which of its values are supported.

A field is judged by what its value does, not by its name: fields that cannot change the logits at inference are
ignored, and of the others each value is either implemented or refused with what it would need. `config.py` reads the
implemented ones; the page docs/checkpoints.md is generated from this table. The fields are those of llm-foundry's
`MPTConfig` and of transformers' `MptConfig`; transformers also writes its own fields into every file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpt_grpc.model.fields import LimitedField, changes_nothing, one_of


def _has_no_overrides(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and not value.get("overrides"))


def _has_no_attention_scale(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and not value.get("attn_scale"))


def _is_not_quantized(value: Any) -> bool:
    options = value if isinstance(value, Mapping) else {}
    # Bitsandbytes' options are saved even if they select nothing.
    selects_nothing = options.get("quant_method") == "bitsandbytes" and not (
        options.get("load_in_4bit") or options.get("load_in_8bit")
    )
    return changes_nothing(value) or selects_nothing


def _is_plain_linear(value: Any) -> bool:
    name = value.get("name") if isinstance(value, Mapping) else value
    return name in (None, "torch", "te")


def activation(value: Any) -> str | None:
    """Returns the activation that `ffn_act_fn` selects, one of `ACTIVATIONS`, or None if it is not implemented."""
    if value is None:
        return "gelu"
    if not isinstance(value, Mapping):
        return None
    arguments = {name: argument for name, argument in value.items() if not changes_nothing(argument)}
    if arguments == {"name": "gelu", "approximate": "tanh"}:
        return "gelu_tanh"
    if arguments == {"name": "gelu", "approximate": "none"}:
        return "gelu"
    name = arguments.pop("name", None)
    return name if name in ACTIVATIONS and not arguments else None


NORM_TYPES = ("low_precision_layernorm", "layernorm", "low_precision_rmsnorm", "rmsnorm", "triton_rmsnorm")
"""The implemented normalizations, in two groups that compute the same."""

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
"""The implemented activations of the feed-forward layers."""

READ: Mapping[str, str] = {
    "d_model": "width of the hidden states; also called hidden_size",
    "n_heads": "number of attention heads; also called num_attention_heads",
    "n_layers": "number of layers; also called num_hidden_layers",
    "vocab_size": "rows of the embedding",
    "max_seq_len": "context length that the model was trained with",
    "expansion_ratio": "width of the feed-forward layers divided by d_model",
    "ffn_config.ffn_hidden_size": "width of the feed-forward layers, instead of expansion_ratio",
    "head_dim": "width of an attention head; d_model / n_heads",
    "learned_pos_emb": "whether positions have learned embeddings; without effect with ALiBi or rope",
    "no_bias": "whether linear and normalization layers have no biases",
    "attention_bias": "whether the attention's input projection has a bias; by default the opposite of no_bias",
    "tie_word_embeddings": "whether the embedding is also the output layer",
    "logit_scale": "factor of the logits: a number or inv_sqrt_d_model",
    "final_logit_softcapping": "bound of the logits, which tanh approaches",
    "norm_eps": "epsilon of the normalization layers; transformers calls it layer_norm_epsilon",
    "attn_config.attn_type": "multihead_attention, multiquery_attention or grouped_query_attention",
    "attn_config.kv_n_heads": "number of key and value heads",
    "attn_config.alibi": "whether attention has linear biases (ALiBi)",
    "attn_config.alibi_bias_max": "largest exponent of ALiBi's slopes",
    "attn_config.rope": "whether attention has rotary position embeddings",
    "attn_config.rope_theta": "base of the rotary embeddings' wavelengths",
    "attn_config.rope_impl": "dail or hf, which compute the same",
    "attn_config.rope_dail_config": "options of dail; implemented: type original",
    "attn_config.rope_hf_config": "options of hf; implemented: type no_scaling, and linear with a factor from 1",
    "attn_config.sliding_window_size": "how many earlier tokens a token attends to; -1 for all",
    "attn_config.clip_qkv": "bound of queries, keys and values",
    "attn_config.qk_ln": "whether queries and keys are normalized",
    "attn_config.softmax_scale": "factor of the attention scores",
}
"""The implemented fields, with what they mean."""

_QUANTIZED = "quantized weights (use the checkpoint from which they were made)"

LIMITED = (
    one_of("norm_type", NORM_TYPES, "another normalization"),
    LimitedField("block_overrides", "null or without overrides", "layers that differ", _has_no_overrides),
    LimitedField("fc_type", "torch or te", "another linear layer", _is_plain_linear),
    *(
        LimitedField(name, "null or without effect", _QUANTIZED, _is_not_quantized)
        for name in ("quantization_config", "compression_config")
    ),
    one_of("is_causal", (True, None), "bidirectional attention"),
    one_of("attn_config.prefix_lm", (False, None), "bidirectional attention over a prefix"),
    one_of("attn_config.qk_gn", (False, None), "group normalization of queries and keys"),
    one_of("attn_config.nope", (False, None), "attention without positions"),
    one_of("attn_config.attn_logit_softcapping", (None,), "soft capping of the attention scores"),
    one_of("attn_config.kv_dim", (None,), "keys and values of another width"),
    one_of("attn_config.reuse_kv_layer_idx", (None,), "layers that share keys and values"),
    one_of("attn_config.fused_qkv", (True, None), "separate weights of queries, keys and values"),
    LimitedField(
        "attn_config.attn_temperature_tuning",
        "null or with attn_scale 0",
        "attention scores that depend on the position",
        _has_no_attention_scale,
    ),
    one_of("ffn_config.ffn_type", ("mptmlp", "mptglu"), "another feed-forward layer"),
    LimitedField("ffn_config.fc_type", "torch or te", "another linear layer", _is_plain_linear),
    LimitedField(
        "ffn_config.ffn_act_fn",
        "null, or gelu (exact or tanh), quick_gelu, relu or silu, by name",
        "another activation",
        lambda value: activation(value) is not None,
    ),
)
"""The fields of which only some values are implemented."""

IGNORED = frozenset(
    # llm-foundry: training, initialization, and choices of kernels that compute the same.
    "attn_config.attn_impl attn_config.attn_pdrop attn_config.attn_uses_sequence_id attn_config.fc_type"
    " attn_config.seq_parallel_world_size attn_config.use_flash_attn attn_impl emb_pdrop embedding_fraction"
    " init_config init_device loss_fn name resid_pdrop use_cache use_pad_tok_in_ffn verbose"
    # transformers: metadata, and sampling options that it used to write into every configuration.
    " add_cross_attention architectures attn_implementation attn_pdrop auto_map bad_words_ids begin_suppress_tokens"
    " bos_token_id cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id"
    " diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id"
    " exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label"
    " initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length min_length model_type"
    " no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states"
    " output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict"
    " return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss"
    " tie_encoder_decoder tokenizer_class tokenizer_name top_k top_p torch_dtype torchscript transformers_version"
    " typical_p use_bfloat16 attn_config.tie_word_embeddings"
    # transformers and training tools: lengths that MPT does not read, and how a checkpoint is loaded or trained.
    " code_revision fused_cross_entropy gradient_checkpointing low_cpu_mem_usage max_new_tokens max_position_embeddings"
    " model_max_length n_positions pad_token pretraining_tp revision seq_length transformers.js_config"
    " trust_remote_code use_return_dict use_safetensors".split()
)
"""The fields that do not affect the logits at inference, whatever their value. transformers also writes its own into
the objects `attn_config` and `ffn_config`."""


def is_ignored(name: str) -> bool:
    """Whether a field, named by its path, does not affect the logits."""
    leaf = name.rpartition(".")[2]
    return (
        name in IGNORED
        or leaf.endswith(("dropout", "pdrop"))
        or (name.startswith(("attn_config.", "ffn_config.")) and leaf in IGNORED)
    )
