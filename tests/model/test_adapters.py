"""LoRA adapters are merged as PEFT merges them, and what cannot be merged is refused in one message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import merged_by_peft, save_adapter, transformers_model
from model.conftest import CPU, Format, make_checkpoint, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpt_grpc.errors import ConfigError, ModelError, SettingsError, WeightsError
from mpt_grpc.model.adapters import Adapter
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.weights import load_model, parameter_shapes
from mpt_grpc.settings import ModelSettings

EVERY_LAYER = ["Wqkv", "out_proj", "up_proj", "down_proj"]
Edit = Callable[[dict[str, Any]], object]


def merged(checkpoint: Path, *adapters: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Returns the parameters of the checkpoint with the adapters merged by the code under test."""
    config = MPTConfig.from_file(checkpoint / "config.json")
    loaded = [Adapter.from_folder(adapter, parameter_shapes(config)) for adapter in adapters]
    return load_model(checkpoint, config, WeightFormat(dtype, CPU), loaded).state_dict()


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)
    assert any(not torch.equal(tensor, base[name]) for name, tensor in actual.items()), "the adapter changes something"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"r": 1, "lora_alpha": 3, "lora_dropout": 0.5, "fan_in_fan_out": True},
        {"r": 4, "use_rslora": True, "target_modules": EVERY_LAYER},
        {"r": 4, "target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*(Wqkv|_proj)"},
        {"target_modules": EVERY_LAYER, "exclude_modules": ["blocks.0.attn.Wqkv", "up_proj"]},
        {"target_modules": EVERY_LAYER, "exclude_modules": r".*blocks\.1\.ffn.*"},
        {"target_modules": EVERY_LAYER, "layers_to_transform": 1},
        {"target_modules": EVERY_LAYER, "layers_to_transform": [0], "layers_pattern": "blocks"},
        {"target_modules": ["transformer.blocks.0.attn.Wqkv", "up_proj"], "layers_to_transform": [1]},
        {
            "target_modules": EVERY_LAYER,
            "rank_pattern": {r"blocks\.0\.attn\.Wqkv": 3, "^transformer.blocks.1.ffn.*": 2},
            "alpha_pattern": {"down_proj": 7, r".*\.1\..*": 1.5, "proj": 100},
        },
        {"use_rslora": True, "rank_pattern": {"Wqkv": 2}, "alpha_pattern": {"Wqkv": 5}},
        {"modules_to_save": ["norm_f", "norm_1"]},
        {"modules_to_save": ["ffn"], "target_modules": EVERY_LAYER},
        {"bias": "all"},  # without effect on a model without biases
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path: Path, config: dict[str, Any]) -> None:
    base = make_checkpoint(tmp_path, tiny_config())
    adapter = save_adapter(tmp_path / "adapter", transformers_model(tmp_path), **config)
    expected = merged_by_peft(transformers_model(tmp_path), [adapter]).state_dict()
    assert_same(merged(tmp_path, adapter), expected, base)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"]},  # PEFT saves the original output layer, too
        {"target_modules": ["lm_head", "Wqkv"], "layers_to_transform": [1]},
        {"target_modules": ["Wqkv"], "modules_to_save": ["lm_head", "wte"]},
        {"target_modules": ["wte", "Wqkv"], "r": 4, "use_rslora": True},
        {"target_modules": ["wte"], "rank_pattern": {"wte": 3}, "alpha_pattern": {"wte": 5}},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_the_untied_embedding_and_output_layer_are_adapted_or_replaced(tmp_path: Path, config: dict[str, Any]) -> None:
    base = make_checkpoint(tmp_path, tiny_config(tie_word_embeddings=False))
    adapter = save_adapter(tmp_path / "adapter", transformers_model(tmp_path), **config)
    expected = merged_by_peft(transformers_model(tmp_path), [adapter]).state_dict()
    assert_same(merged(tmp_path, adapter), expected, base)


def bare_model(weights: Mapping[str, Tensor]) -> nn.Module:
    """Returns modules that have the names and weights of a model whose variant transformers does not have."""
    root = nn.Module()
    for name, tensor in weights.items():
        *parents, leaf, _ = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        bias = name.replace(".weight", ".bias") in weights
        if leaf in ("wte", "wpe"):
            module.add_module(leaf, nn.Embedding(*tensor.shape))
        elif tensor.dim() == 2:
            module.add_module(leaf, nn.Linear(tensor.shape[1], tensor.shape[0], bias=bias))
        elif not name.endswith(".bias"):
            module.add_module(leaf, nn.LayerNorm(tensor.shape[0], bias=bias))
    root.load_state_dict(weights)
    return root


def test_gated_layers_and_fewer_key_heads_are_adapted(tmp_path: Path) -> None:
    grouped = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
    base = make_checkpoint(tmp_path, tiny_config(grouped, ffn_config={"ffn_type": "mptglu"}))
    adapter = save_adapter(tmp_path / "adapter", bare_model(base), target_modules=[*EVERY_LAYER, "gate_proj"])
    assert_same(merged(tmp_path, adapter), merged_by_peft(bare_model(base), [adapter]).state_dict(), base)


def test_positions_with_learned_embeddings_are_adapted(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path, tiny_config({"alibi": False}))
    adapter = save_adapter(tmp_path / "adapter", bare_model(base), target_modules=["wpe", "Wqkv"])
    assert_same(merged(tmp_path, adapter), merged_by_peft(bare_model(base), [adapter]).state_dict(), base)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_are_replaced(tmp_path: Path, bias: str) -> None:
    base = make_checkpoint(tmp_path, tiny_config(no_bias=False))
    trained = bare_model({name: tensor + 1 if name.endswith("bias") else tensor for name, tensor in base.items()})
    adapter = save_adapter(tmp_path / "adapter", trained, bias=bias, target_modules=["Wqkv", "up_proj"])
    expected, actual = merged_by_peft(bare_model(base), [adapter]).state_dict(), merged(tmp_path, adapter)
    assert_same(actual, expected, base)
    replaced = {
        name for name, tensor in actual.items() if name.endswith("bias") and not torch.equal(tensor, base[name])
    }
    adapted = {name for name in base if name.endswith(("Wqkv.bias", "up_proj.bias"))}
    assert replaced == {"none": set(), "lora_only": adapted, "all": {n for n in base if n.endswith("bias")}}[bias]


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_several_adapters_are_merged_in_turn(tmp_path: Path, format: Format) -> None:  # noqa: A002
    base = make_checkpoint(tmp_path, tiny_config(), shards=2, format=format)
    configs: list[dict[str, Any]] = [
        {"target_modules": ["Wqkv", "up_proj"]},
        {"target_modules": ["Wqkv"], "modules_to_save": ["up_proj", "norm_f"]},
        {"target_modules": ["up_proj"], "r": 2},
    ]
    adapters = [
        save_adapter(tmp_path / str(seed), transformers_model(tmp_path), seed=seed, format=format, **config)
        for seed, config in enumerate(configs)
    ]
    assert all((adapter / f"adapter_model.{format}").exists() for adapter in adapters)
    assert_same(merged(tmp_path, *adapters), merged_by_peft(transformers_model(tmp_path), adapters).state_dict(), base)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_merging_rounds_once(tmp_path: Path, stored: torch.dtype) -> None:
    make_checkpoint(tmp_path, tiny_config())
    adapter = save_adapter(tmp_path / "adapter", transformers_model(tmp_path))
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file)
    in_float32 = merged(tmp_path, adapter)
    for name, tensor in merged(tmp_path, adapter, dtype=torch.float16).items():
        assert torch.equal(tensor, in_float32[name].half()), name


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path, tiny_config())
    return tmp_path


@pytest.fixture
def adapter(checkpoint: Path) -> Path:
    return save_adapter(checkpoint / "adapter", transformers_model(checkpoint))


def edit_config(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("field", "value", "supported"),
    [
        ("peft_type", "IA3", "only 'LORA' is"),
        ("use_dora", True, "supported: false or null"),
        ("bias", "some", "supported: none, all, lora_only or null"),
        ("lora_bias", True, "supported: false or null"),
        ("layer_replication", [[0, 2], [1, 2]], "supported: null or empty"),
        ("target_parameters", ["ffn.up_proj.weight"], "supported: null or empty"),
        ("trainable_token_indices", [1, 2], "supported: null or empty"),
        ("alora_invocation_tokens", [5], "supported: null or empty"),
        ("init_lora_weights", "pissa", "supported: null, true, false, gaussian"),
        ("r", 0, "expected an integer from 1"),
        ("lora_alpha", "16", "expected a non-negative number"),
        ("lora_alpha", float("nan"), "expected a non-negative number"),
        ("lora_alpha", 10**400, "expected a non-negative number"),
        ("use_rslora", "yes", "expected true or false"),
        ("rank_pattern", {"Wqkv": 0}, "expected numbers from 1"),
        ("alpha_pattern", {"Wqkv": float("inf")}, "expected numbers from 0"),
        ("alpha_pattern", {"Wqkv": True}, "expected numbers from 0"),
        ("alpha_pattern", {"(": 1}, "expected an object whose keys are regular expressions"),
        ("target_modules", "(", "expected a list of names or a regular expression"),
        ("exclude_modules", [1], "expected a list of names of modules"),
        ("modules_to_save", "norm_f", "expected a list of names of modules"),
        ("layers_to_transform", "0", "expected a number or a list"),
        ("new_variant", {"strength": 1}, "unknown field, which may change the computation"),
    ],
)
def test_a_field_that_cannot_be_merged_is_refused(adapter: Path, field: str, value: Any, supported: str) -> None:
    edit_config(adapter, **{field: value})
    with pytest.raises(ConfigError) as raised:
        merged(adapter.parent, adapter)
    assert str(raised.value).startswith(f"{adapter / 'adapter_config.json'}: {field}: ")
    assert supported in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_fields_that_cannot_be_merged_are_refused_at_once(adapter: Path) -> None:
    edit_config(adapter, use_dora=True, bias="some", r=-1, new_variant=2)
    with pytest.raises(ConfigError, match=r"bias: .*; use_dora: .*; r: .*; new_variant: .*; where PEFT can merge"):
        merged(adapter.parent, adapter)


def test_fields_without_effect_are_accepted(adapter: Path) -> None:
    before = merged(adapter.parent, adapter)
    inert = {
        "new_list": [],
        "new_switch": False,
        "new_option": None,
        "_state": 1,
        "merge_weights": True,
        "lora_dropout": 0.3,
        "task_type": "CAUSAL_LM",
    }
    edit_config(adapter, **inert, bias="NONE", use_dora=None, megatron_core="other", base_model_name_or_path="x/y")
    for name, tensor in merged(adapter.parent, adapter).items():
        assert torch.equal(tensor, before[name])


A = "base_model.model.transformer.blocks.0.attn.Wqkv.lora_A.weight"
B = "base_model.model.transformer.blocks.0.attn.Wqkv.lora_B.weight"
EMBEDDING, HEAD = "base_model.model.transformer.wte.weight", "base_model.model.lm_head.weight"


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda t: t.pop(A), f"{A}' is missing"),
        (lambda t: t.pop(B), f"{B}' is missing"),
        (lambda t: t.update({A: t[A].T.contiguous()}), f"{A}' has shape [64, 8], not [8, 64]"),
        (lambda t: t.update({B: t[B][:, :4].contiguous()}), f"{B}' has shape [192, 4], not [192, 8]"),
        (lambda t: t.update({A: t[A].to(torch.int8)}), f"{A}' has type torch.int8; supported: floating-point types"),
        (lambda t: t.update({A.replace("0", "7"): t[A].clone()}), "blocks.7.attn.Wqkv.lora_A.weight' is unexpected"),
        (
            lambda t: t.update({A.replace("attn.Wqkv", "ffn.up_proj"): t[A].clone()}),
            "lora_A.weight' is unexpected; supported: ",
        ),
        (lambda t: t.update({A.removeprefix("base_model.model."): t[A].clone()}), "lora_A.weight' is unexpected"),
        (lambda t: t.update({B.replace("weight", "bias"): t[B][:, 0].clone()}), "lora_B.bias' is unexpected"),
        (lambda t: t.update({"base_model.model.score.weight": t[A].clone()}), "score.weight' is unexpected"),
        (lambda t: t.update({HEAD: torch.zeros(96, 64)}), f"{HEAD}': the embedding is also the output layer"),
        (lambda t: t.update({EMBEDDING: torch.zeros(96, 64)}), f"{EMBEDDING}': the embedding is also the output layer"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_refused(adapter: Path, edit: Edit, why: str) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=f"^{re.escape(str(file))}: tensor '.*{re.escape(why)}"):
        merged(adapter.parent, adapter)


def test_an_adapter_of_another_model_is_refused_in_one_short_line(adapter: Path, tmp_path: Path) -> None:
    larger = tmp_path / "larger"
    make_checkpoint(larger, tiny_config(d_model=128, n_layers=8))
    with pytest.raises(WeightsError, match=r"lora_A.weight' is missing; .*; and \d+ more$") as raised:
        merged(larger, adapter)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("modules", [[], ["q_proj", "v_proj"], ".*query_key_value"])
def test_target_modules_that_the_model_does_not_have_are_refused(adapter: Path, modules: object) -> None:
    edit_config(adapter, target_modules=modules)
    with pytest.raises(
        WeightsError, match=r"target_modules of adapter_config.json match none of the model's Wqkv, out"
    ):
        merged(adapter.parent, adapter)


def test_a_module_to_save_must_be_in_the_file(adapter: Path) -> None:
    edit_config(adapter, modules_to_save=["norm_f"])
    with pytest.raises(WeightsError, match=r"base_model.model.transformer.norm_f.weight' is missing"):
        merged(adapter.parent, adapter)


def test_a_bias_to_replace_must_be_in_the_file(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path, tiny_config(no_bias=False))
    adapter = save_adapter(tmp_path / "adapter", bare_model(base))
    edit_config(adapter, bias="lora_only")
    with pytest.raises(
        WeightsError, match=r"blocks.0.attn.Wqkv.bias' is missing; .*blocks.1.attn.Wqkv.bias' is missing$"
    ):
        merged(tmp_path, adapter)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("adapter_config.json", None, "--adapter .*: no adapter_config.json; expected a folder as PEFT saves it"),
        ("adapter_config.json", b"{", "adapter_config.json: invalid JSON"),
        (
            "adapter_model.safetensors",
            None,
            "--adapter .*: no weights; expected adapter_model.safetensors or adapter_model.bin",
        ),
        ("adapter_model.safetensors", b"{", "cannot read .*adapter_model.safetensors"),
    ],
)
def test_a_missing_or_broken_file_is_refused(adapter: Path, name: str, content: bytes | None, why: str) -> None:
    if content is None:
        (adapter / name).unlink()
    else:
        (adapter / name).write_bytes(content)
    with pytest.raises(ModelError, match=why):
        merged(adapter.parent, adapter)


def test_a_pickle_with_code_is_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({A: print}, adapter / "adapter_model.bin")
    with pytest.raises(WeightsError, match=r"cannot read .*adapter_model.bin"):
        merged(adapter.parent, adapter)


def test_random_weights_have_no_adapters() -> None:
    with pytest.raises(SettingsError, match=r"^--adapter: .*; omit --load-format random$"):
        ModelSettings(adapters=(Path("adapter"),), load_format="random")
