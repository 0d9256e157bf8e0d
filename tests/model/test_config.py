"""Reading `config.json`, as published and as saved by transformers; unimplemented fields are rejected by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model.conftest import tiny_config
from transformers import MptConfig

from mpt_grpc.errors import ConfigError, ModelError
from mpt_grpc.model.config import MPTConfig, Rope

PUBLISHED = next(
    (folder for parent in Path(__file__).parents if (folder := parent / "shared/data/mpt_configs").is_dir()), None
)
GQA = "grouped_query_attention"

SEVEN_B = MPTConfig(
    d_model=4096,
    n_heads=32,
    n_kv_heads=32,
    n_layers=32,
    d_ffn=16384,
    vocab_size=50432,
    max_seq_len=2048,
    learned_positions=False,
    alibi=True,
    alibi_bias_max=8.0,
    rope=None,
    sliding_window=None,
    softmax_scale=1 / math.sqrt(128),
    clip_qkv=None,
    qk_ln=False,
    rms_norm=False,
    norm_eps=1e-5,
    bias=False,
    qkv_bias=False,
    gated_ffn=False,
    activation="gelu",
    tied_head=True,
    logit_scale=None,
    logit_softcap=None,
)


@pytest.mark.skipif(PUBLISHED is None, reason="the published configs are not on this machine (shared/data/mpt_configs)")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mpt-7b", SEVEN_B),
        ("mpt-7b-chat", SEVEN_B),
        ("mpt-7b-instruct", SEVEN_B),
        ("mpt-7b-storywriter", replace(SEVEN_B, max_seq_len=65536, alibi_bias_max=16.0, clip_qkv=6.0)),
        ("mpt-30b", replace(SEVEN_B, d_model=7168, n_heads=64, n_kv_heads=64, n_layers=48, d_ffn=28672,
                            max_seq_len=8192, softmax_scale=1 / math.sqrt(112))),
        ("replit-code-v1-3b", replace(SEVEN_B, d_model=2560, d_ffn=10240, vocab_size=32768,
                                      softmax_scale=1 / math.sqrt(80))),
        ("replit-code-v1_5-3b", replace(SEVEN_B, d_model=3072, n_heads=24, n_kv_heads=8, d_ffn=12288, vocab_size=32768,
                                        max_seq_len=4096)),
    ],
)  # fmt: skip
def test_published_configs_are_read_unmodified(name: str, expected: MPTConfig) -> None:
    assert PUBLISHED is not None
    assert MPTConfig.from_file(PUBLISHED / f"{name}.json") == expected


def test_absent_fields_have_the_defaults_of_llm_foundry() -> None:
    assert MPTConfig.from_dict({"model_type": "mpt"}) == replace(
        SEVEN_B, d_model=2048, n_heads=16, n_kv_heads=16, n_layers=24, d_ffn=8192, vocab_size=50368
    )


@pytest.mark.parametrize(
    ("raw", "field", "expected"),
    [
        (tiny_config({"clip_qkv": 6}), "clip_qkv", 6.0),
        (tiny_config({"clip_qkv": 0.5}), "clip_qkv", 0.5),
        (tiny_config({"clip_qkv": 0}), "clip_qkv", None),
        (tiny_config({"attn_type": "multiquery_attention"}), "n_kv_heads", 1),
        (tiny_config({"attn_type": "multiquery_attention", "kv_n_heads": 1}), "n_kv_heads", 1),
        (tiny_config({"attn_type": "multihead_attention", "kv_n_heads": 4}), "n_kv_heads", 4),
        (tiny_config({"attn_type": GQA, "kv_n_heads": 2}), "n_kv_heads", 2),
        (tiny_config({"attn_type": GQA, "kv_n_heads": 2.0}), "n_kv_heads", 2),
        (tiny_config({"softmax_scale": 0.25}), "softmax_scale", 0.25),
        (tiny_config({"softmax_scale": None}), "softmax_scale", 0.25),
        (tiny_config({"alibi": False}), "alibi", False),
        (tiny_config({"qk_ln": True}), "qk_ln", True),
        (tiny_config(logit_scale=-1), "logit_scale", -1.0),
        (tiny_config(logit_scale="inv_sqrt_d_model"), "logit_scale", 0.125),
        (tiny_config(expansion_ratio=2.5), "d_ffn", 160),
        (tiny_config(no_bias=False), "bias", True),
        (tiny_config(layer_norm_epsilon=1e-6), "norm_eps", 1e-6),
        (tiny_config(norm_eps=0), "norm_eps", 0.0),
        (tiny_config(norm_eps=1e-6, layer_norm_epsilon=1e-6), "norm_eps", 1e-6),
        (tiny_config(max_seq_len=256.0), "max_seq_len", 256),
        (tiny_config(ffn_config={"ffn_hidden_size": 100}), "d_ffn", 100),
        (tiny_config({"rope": True}), "rope", Rope(10_000.0, 1.0)),
        (tiny_config({"rope": True}), "alibi", False),
        (tiny_config({"rope": True}), "learned_positions", False),
        (tiny_config({"alibi": False}), "learned_positions", True),
        (tiny_config({"alibi": False}, learned_pos_emb=False), "learned_positions", False),
        (tiny_config({"rope": True, "rope_theta": 500_000}), "rope", Rope(500_000.0, 1.0)),
        (
            tiny_config({"rope": True, "rope_impl": "hf", "rope_hf_config": {"type": "linear", "factor": 2}}),
            "rope",
            Rope(10_000.0, 2.0),
        ),
        (tiny_config({"sliding_window_size": 256.0}), "sliding_window", 256),
        (tiny_config(norm_type="Low_Precision_RMSNorm"), "rms_norm", True),
        (tiny_config(attention_bias=True), "qkv_bias", True),
        (tiny_config(attention_bias=True), "bias", False),
        (tiny_config(no_bias=False), "qkv_bias", True),
        (tiny_config(ffn_config={"ffn_type": "mptglu"}), "gated_ffn", True),
        (tiny_config(ffn_config={"ffn_act_fn": {"name": "silu", "inplace": False}}), "activation", "silu"),
        (tiny_config(tie_word_embeddings=False), "tied_head", False),
        (tiny_config(final_logit_softcapping=30), "logit_softcap", 30.0),
    ],
)
def test_fields_that_affect_the_computation_are_read(raw: dict[str, Any], field: str, expected: object) -> None:
    value = getattr(MPTConfig.from_dict(raw), field)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prefix_lm", True),
        ("qk_gn", True),
        ("rope", "yes"),
        ("sliding_window_size", 0),
        ("sliding_window_size", "all"),
        ("attn_logit_softcapping", 30.0),
        ("kv_dim", 32),
        ("reuse_kv_layer_idx", 0),
        ("nope", True),
        ("fused_qkv", False),
        ("attn_temperature_tuning", {"attn_scale": 0.1, "floor_scale": 8192}),
        ("new_scale", 0.5),
        ("alibi", "yes"),
        ("alibi", None),
        ("qk_ln", 1),
        ("alibi_bias_max", "8"),
        ("alibi_bias_max", math.nan),
        ("clip_qkv", -6),
        ("clip_qkv", True),
        ("softmax_scale", math.inf),
        ("softmax_scale", 10**400),
        ("attn_type", "linear_attention"),
        ("attn_type", ["multihead_attention"]),
        ("kv_n_heads", 2),
    ],
)
def test_unimplemented_attention_fields_are_named_in_the_error(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        MPTConfig.from_dict(tiny_config({field: value}))
    assert f"attn_config.{field}: {value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("norm_type", "batchnorm"),
        ("norm_type", None),
        ("tie_word_embeddings", None),
        ("final_logit_softcapping", -30.0),
        ("block_overrides", {"order": [{"name": "wide"}], "overrides": {"wide": {"d_model": 128}}}),
        ("head_dim", 32),
        ("attention_bias", "all"),
        ("d_model", 10**12),
        ("expansion_ratio", 1e300),
        ("max_seq_len", 256.5),
        ("num_experts", 8),
        ("d_model", "64"),
        ("d_model", 0),
        ("n_heads", 3),
        ("n_layers", True),
        ("vocab_size", None),
        ("max_seq_len", -1),
        ("expansion_ratio", 0.3),
        ("expansion_ratio", "4"),
        ("no_bias", 1),
        ("learned_pos_emb", "no"),
        ("logit_scale", "sqrt"),
        ("logit_scale", math.nan),
        ("logit_scale", 10**400),
        ("layer_norm_epsilon", -1e-5),
    ],
)
def test_unimplemented_model_fields_are_named_in_the_error(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        MPTConfig.from_dict(tiny_config(**{field: value}))
    assert f"{field}: {value!r}" in str(error.value) or f"{field}: {value} " in str(error.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (tiny_config(ffn_config={"ffn_type": "mb_moe"}), "ffn_config.ffn_type: 'mb_moe'"),
        (tiny_config(ffn_config={"ffn_act_fn": {"name": "mish"}}), "ffn_config.ffn_act_fn: {'name': 'mish'}"),
        (tiny_config(ffn_config={"ffn_act_fn": "silu"}), "ffn_config.ffn_act_fn: 'silu'"),
        (
            tiny_config(ffn_config={"ffn_act_fn": {"name": "gelu", "approximate": "exp"}}),
            "ffn_config.ffn_act_fn: {'name': 'gelu', 'approximate': 'exp'}",
        ),
        (tiny_config({"rope": True, "rope_theta": 0}), "attn_config.rope_theta: 0"),
        (tiny_config({"rope": True, "rope_impl": "xformers"}), "attn_config.rope_impl: 'xformers'"),
        (
            tiny_config({"rope": True, "rope_impl": "dail", "rope_dail_config": {"type": "xpos"}}),
            "attn_config.rope_dail_config: {'type': 'xpos'}: would need",
        ),
        (
            tiny_config({"rope": True, "rope_impl": "hf", "rope_hf_config": {"type": "dynamic", "factor": 2}}),
            "attn_config.rope_hf_config: {'type': 'dynamic', 'factor': 2}: would need",
        ),
        (tiny_config({"rope": True, "rope_impl": "hf", "rope_hf_config": "linear"}), "attn_config.rope_hf_config"),
        (tiny_config({"rope": True}, d_model=60), "attn_config.rope: True: needs an even width"),
        ({**tiny_config(), "attn_config": []}, "attn_config: expected a JSON object, not []"),
        (tiny_config({"attn_type": GQA}), "attn_config.kv_n_heads: None"),
        (tiny_config({"attn_type": GQA, "kv_n_heads": 2.5}, n_heads=5, d_model=80), "attn_config.kv_n_heads: 2.5"),
        (tiny_config({"attn_type": GQA, "kv_n_heads": 3}), "attn_config.kv_n_heads: 3"),
        (tiny_config({"attn_type": GQA, "kv_n_heads": 0}), "attn_config.kv_n_heads: 0"),
        (tiny_config({"attn_type": "multiquery_attention", "kv_n_heads": 2}), "attn_config.kv_n_heads: 2"),
        (tiny_config(norm_eps=1e-5, layer_norm_epsilon=1e-6), "layer_norm_epsilon: 1e-06"),
        ({**tiny_config(), "attn_config": "flash"}, "attn_config: expected a JSON object, not 'flash'"),
        (tiny_config(num_hidden_layers=3), "num_hidden_layers: 3: differs from n_layers, which is 2"),
        (
            tiny_config(quantization_config={"bits": 4}),
            "quantization_config: {'bits': 4}: would need quantized weights (use the checkpoint from which they were",
        ),
        (tiny_config(compression_config={"format": "x"}), "compression_config: {'format': 'x'}: would need quantized"),
        (tiny_config(num_experts=8), "num_experts: 8: unknown field, which may change the computation; remove it if"),
        (
            tiny_config(clip_qkv=6),
            "json: clip_qkv: 6: unknown field, which may change the computation; move it into attn_",
        ),
        (tiny_config(n_layers=1 << 24), "n_layers: 16777216: expected an integer from 1 to 1024"),
        ({}, "model_type: None"),
    ],
)
def test_inconsistent_fields_are_rejected(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        MPTConfig.from_dict(raw)
    assert message in str(error.value)


def test_a_config_saved_by_transformers_is_read(tmp_path: Path) -> None:
    saved = MptConfig(
        d_model=96, n_heads=6, n_layers=3, vocab_size=100, attn_config={"clip_qkv": 6.0, "alibi_bias_max": 16}
    )
    (tmp_path / "diff").mkdir()
    saved.save_pretrained(tmp_path / "diff")
    (tmp_path / "whole.json").write_text(saved.to_json_string(use_diff=False))
    expected = replace(SEVEN_B, d_model=96, n_heads=6, n_kv_heads=6, n_layers=3, d_ffn=384, vocab_size=100,
                   softmax_scale=0.25, clip_qkv=6.0, alibi_bias_max=16.0)  # fmt: skip
    assert MPTConfig.from_file(tmp_path / "diff" / "config.json") == expected
    assert MPTConfig.from_file(tmp_path / "whole.json") == expected


@pytest.mark.parametrize(
    "inert",
    [
        tiny_config({"attn_uses_sequence_id": True}),
        tiny_config({"rope": False, "rope_theta": 500000, "rope_impl": "hf", "rope_hf_config": {"type": "linear"}}),
        tiny_config({"nope": False, "fused_qkv": True, "sliding_window_size": None}),
        tiny_config({"attn_temperature_tuning": {"attn_scale": 0.0, "floor_scale": 8192}}),
        tiny_config({"a_new_feature": False, "another": None, "a_third": {}}),
        tiny_config(head_dim=16, attention_bias=False, loss_fn="torch_crossentropy"),
        tiny_config(norm_type="Low_Precision_LayerNorm"),
        tiny_config(norm_type="LayerNorm"),
        tiny_config(fc_type={"name": "torch"}, ffn_config={"ffn_type": "mptmlp", "fc_type": {"name": "te"}}),
        tiny_config(ffn_config={"ffn_act_fn": {"name": "gelu", "approximate": "none"}}),
        tiny_config(block_overrides={"order": [{"name": "default"}], "overrides": {}}),
        tiny_config(a_new_feature=False, another=None),
        tiny_config(_attn_implementation="eager", unsloth_version="1", gradient_checkpointing=True, is_causal=True),
        tiny_config({"_commit_hash": "0", "model_type": ""}, max_position_embeddings=2048, hidden_size=64),
        tiny_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": False}),
        tiny_config({"qk_ln": None, "rope": None, "attn_pdrop": 0.1}, ffn_config=None, pretraining_tp=1),
        tiny_config({"tie_word_embeddings": True}),
        tiny_config(attention_dropout=0.0, hidden_dropout=0.1, fused_cross_entropy=True),
    ],
)
def test_values_that_change_nothing_are_accepted(inert: dict[str, Any]) -> None:
    assert MPTConfig.from_dict(inert) == MPTConfig.from_dict(tiny_config())


@pytest.mark.skipif(PUBLISHED is None, reason="the configs of llm-foundry are not on this machine (shared/data)")
@pytest.mark.parametrize("version", ["v0.4.0", "v0.12.0", "HEAD"])
def test_configs_written_by_llm_foundry_are_read_unmodified(version: str) -> None:
    assert PUBLISHED is not None
    assert MPTConfig.from_file(PUBLISHED / "llm-foundry" / f"{version}.json") == replace(
        SEVEN_B, d_model=768, n_heads=12, n_kv_heads=12, n_layers=12, d_ffn=3072, vocab_size=50368,
        softmax_scale=1 / math.sqrt(64),
    )  # fmt: skip


@pytest.mark.skipif(PUBLISHED is None, reason="the configs of llm-foundry are not on this machine (shared/data)")
def test_a_config_with_rope_written_by_llm_foundry_is_read_unmodified() -> None:
    assert PUBLISHED is not None
    config = MPTConfig.from_file(PUBLISHED / "llm-foundry" / "v0.8.0-rope.json")
    assert (config.rope, config.alibi, config.learned_positions) == (Rope(10_000.0, 1.0), False, False)


def test_all_obstacles_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        MPTConfig.from_dict(tiny_config({"nope": True, "qk_gn": True}, norm_type="none", num_experts=8, n_layers=0))
    for name in ("attn_config.nope", "attn_config.qk_gn", "norm_type", "num_experts", "n_layers"):
        assert f"{name}: " in str(error.value)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()), encoding="utf-8-sig")
    assert MPTConfig.from_file(tmp_path / "config.json") == MPTConfig.from_dict(tiny_config())


@pytest.mark.parametrize("text", [None, "", "{", "[" * 100_000, "[]", '"mpt"', "\xff"])
def test_a_file_that_is_not_a_json_object_is_rejected_with_its_path(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        MPTConfig.from_file(path)


def test_the_error_has_the_field_its_value_and_what_it_would_need(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config({"prefix_lm": True})))
    with pytest.raises(
        ConfigError, match=r"attn_config\.prefix_lm: True: would need bidirectional attention .* supported: false"
    ):
        MPTConfig.from_file(tmp_path / "config.json")
