"""Checkpoints with other names of fields and tensors are the same models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model.conftest import Format, load, make_checkpoint, random_tokens, random_weights, run_prompt, tiny_config
from transformers import MptConfig, MptForCausalLM

from mpt_grpc.errors import ConfigError, WeightsError
from mpt_grpc.model.config import MPTConfig

CONFIG = tiny_config()
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
MOSAIC_GPT = {
    "model_type": "mosaic_gpt",
    "architectures": ["MosaicGPT"],
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_clip_qkv": 6,
    "attn_impl": "torch",
    "attn_pdrop": 0,
    "attn_qk_ln": True,
    "attn_uses_sequence_id": False,
    "d_model": 64,
    "hidden_size": 64,
    "emb_init_std": None,
    "emb_init_uniform_lim": None,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "fan_mode": "fan_in",
    "init_device": "cpu",
    "init_div_is_residual": True,
    "init_gain": 0,
    "init_nonlinearity": "relu",
    "init_std": 0.02,
    "logit_scale": None,
    "low_precision_layernorm": True,
    "max_seq_len": 128,
    "mlp_ratio": 4,
    "n_heads": 4,
    "n_layers": 2,
    "no_bias": True,
    "param_init_fn": "kaiming_normal_",
    "prefix_lm": False,
    "resid_pdrop": 0,
    "softmax_scale": None,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "verbose": 0,
    "vocab_size": 96,
}
"""The fields of MPT-1B's config.json, with small sizes."""
OLD_NAMES = {"norm_1": "ln_1", "norm_2": "ln_2", "norm_f": "ln_f", "ffn.up_proj": "mlp.mlp_up"}
OLD_NAMES |= {"ffn.down_proj": "mlp.mlp_down"}


def logits(folder: Path) -> torch.Tensor:
    return run_prompt(load(folder), random_tokens(20), [20])


def old_name(name: str) -> str:
    for new, old in OLD_NAMES.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def test_mosaic_gpt_is_mpt_by_other_names(tmp_path: Path) -> None:
    config = tiny_config({"clip_qkv": 6, "qk_ln": True})
    weights = random_weights(config)
    make_checkpoint(tmp_path / "new", config, weights)
    make_checkpoint(tmp_path / "old", MOSAIC_GPT, {old_name(name): tensor for name, tensor in weights.items()})
    assert torch.equal(logits(tmp_path / "old"), logits(tmp_path / "new"))


def test_mosaic_gpt_has_biases_and_learned_positions_unless_its_fields_say_otherwise() -> None:
    absent = {name: value for name, value in MOSAIC_GPT.items() if name not in ("alibi", "no_bias")}
    config = MPTConfig.from_dict(absent)
    assert (config.alibi, config.learned_positions, config.bias) == (False, True, True)
    assert MPTConfig.from_dict({**MOSAIC_GPT, "multiquery_attention": True}).n_kv_heads == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prefix_lm", True, "json: prefix_lm: True: would need bidirectional attention"),
        ("mlp_ratio", 0, "json: mlp_ratio: 0.0: "),
        ("n_heads", 12, "n_heads: 12: MosaicGPT had other linear biases unless this is a power of two"),
        ("hidden_size", 32, "hidden_size: 32: differs from d_model, which is 64"),
        ("ffn_config.width", 1, "ffn_config.width: 1: unknown field, which may change the computation"),
        ("attn_config", 3, "attn_config: expected a JSON object, not 3"),
    ],
)
def test_fields_of_mosaic_gpt_that_are_not_supported_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        MPTConfig.from_dict({**MOSAIC_GPT, "d_model": 96 if field == "n_heads" else 64, field: value})
    assert message in str(error.value)


def test_fields_are_read_by_the_names_that_transformers_gives_them() -> None:
    expected = MptConfig(hidden_size=96, num_attention_heads=6, num_hidden_layers=3, layer_norm_epsilon=1e-6)
    names = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 3, "layer_norm_epsilon": 1e-6}
    config = MPTConfig.from_dict({"model_type": "mpt", **names})
    assert (config.d_model, config.n_heads, config.n_layers, config.norm_eps) == (96, 6, 3, 1e-6)
    assert (expected.d_model, expected.n_heads, expected.n_layers) == (96, 6, 3)


def test_tensors_saved_without_the_output_layer_are_loaded_as_transformers_does(tmp_path: Path) -> None:
    saved = MptForCausalLM(MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=96)).eval()
    saved.transformer.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = saved(torch.tensor([random_tokens(20)])).logits[0, -1:]
    torch.testing.assert_close(logits(tmp_path), expected, rtol=0, atol=1e-4)


def test_a_tied_embedding_may_be_stored_by_the_name_of_the_output_layer(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    make_checkpoint(tmp_path / "both", CONFIG, {**weights, HEAD: weights[EMBEDDING].to(torch.bfloat16)})
    make_checkpoint(tmp_path / "head", CONFIG, {HEAD if n == EMBEDDING else n: t for n, t in weights.items()})
    assert torch.equal(logits(tmp_path / "head"), logits(tmp_path / "both"))


@pytest.mark.parametrize(
    "around",
    [
        "model.",
        "module.",
        "model.module.",
        "_orig_mod.",
        "_orig_mod.model.",
        "base_model.model.",
        "_forward_module.",
        "pretrained_model.",
        "_fsdp_wrapped_module.",
    ],
)
def test_modules_around_the_model_compute_nothing(tmp_path: Path, around: str) -> None:
    weights = random_weights(CONFIG)
    make_checkpoint(tmp_path / "plain", CONFIG, weights)
    make_checkpoint(tmp_path / "around", CONFIG, {around + name: tensor for name, tensor in weights.items()})
    assert torch.equal(logits(tmp_path / "around"), logits(tmp_path / "plain"))


@pytest.mark.parametrize("around", ["_orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_modules_around_a_layer_compute_nothing(tmp_path: Path, around: str) -> None:
    weights = random_weights(CONFIG)
    make_checkpoint(tmp_path / "plain", CONFIG, weights)
    named = {name.replace("blocks.1.", f"blocks.1.{around}"): tensor for name, tensor in weights.items()}
    make_checkpoint(tmp_path / "around", CONFIG, named)
    assert torch.equal(logits(tmp_path / "around"), logits(tmp_path / "plain"))


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_constants_and_what_only_training_uses_are_ignored(tmp_path: Path, format: Format) -> None:  # noqa: A002
    constants = {
        "transformer.attn_bias": torch.zeros(1, 4, 1, 128),
        "transformer.blocks.0.attn.rotary_emb.inv_freq": torch.zeros(8),
        "transformer.position_ids": torch.arange(8),
        "transformer.blocks.0.attn.Wqkv._extra_state": torch.zeros(0, dtype=torch.uint8),
        "v_head.summary.weight": torch.ones(1, 64),
    }
    weights = random_weights(CONFIG)
    make_checkpoint(tmp_path / "plain", CONFIG, weights)
    make_checkpoint(tmp_path / "more", CONFIG, {**weights, **constants}, format=format)
    assert torch.equal(logits(tmp_path / "more"), logits(tmp_path / "plain"))


QKV = "transformer.blocks.0.attn.Wqkv"


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        (("qweight", "qzeros", "scales", "g_idx"), "weights quantized by GPTQ or AWQ are not supported; use the check"),
        (
            ("SCB", "weight_format"),
            "weights quantized by bitsandbytes are not supported; use the checkpoint from which",
        ),
        (("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"), "quantized by bitsandbytes"),
        (
            ("weight_packed", "weight_scale", "weight_shape"),
            "quantized by compressed-tensors or to FP8 are not supported",
        ),
        (("weight_scale_inv",), "quantized by compressed-tensors or to FP8"),
        (("base_layer.weight",), "an adapter is not merged; save the model as merge_and_unload returns it"),
        (("lora_A.default.weight", "lora_B.default.weight"), "an adapter is not merged"),
        (("original_module.weight", "modules_to_save.default.weight"), "an adapter is not merged"),
        (("ia3_l",), "an adapter is not merged"),
        (("../Wq.weight", "../Wk.weight"), "separate weights of queries, keys and values are not supported"),
    ],
)
def test_weights_of_other_kinds_are_refused_with_what_they_are(
    tmp_path: Path, leaves: tuple[str, ...], message: str
) -> None:
    weights = {name: tensor for name, tensor in random_weights(CONFIG).items() if not name.startswith(QKV)}
    names = (f"{QKV}.{leaf}".replace("Wqkv.../", "") for leaf in leaves)
    make_checkpoint(tmp_path, CONFIG, {**weights, **{name: torch.zeros(4, dtype=torch.int32) for name in names}})
    with pytest.raises(WeightsError, match=rf"^tensor '{QKV[:-4]}.*' is not part of this model; .*{message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (HEAD, torch.zeros(0), r"tensor 'lm_head\.weight' has shape \[0\], not \[96, 64\]"),
        ("wte.weight", torch.zeros(96, 64), r"tensor 'transformer\.wte\.weight' is stored twice"),
        ("transformer.norm_f.weight", torch.ones(64, dtype=torch.int8), r"norm_f\.weight' has type torch\.int8; supp"),
    ],
)
def test_tensors_that_cannot_be_meant_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    make_checkpoint(tmp_path, CONFIG, {**random_weights(CONFIG), name: tensor})
    with pytest.raises(WeightsError, match=message):
        load(tmp_path)
