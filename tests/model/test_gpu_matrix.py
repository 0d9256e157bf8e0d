"""Matrices in the form in which a GPU holds them, as PyTorch multiplies by them on any device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model.conftest import CPU, Stepper, make_checkpoint, random_tokens, random_weights, tiny_config

from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.gpu_matrix import rounded
from mpt_grpc.model.linear import Linear, WeightFormat
from mpt_grpc.model.weights import load_model, random_model

INT8 = WeightFormat(torch.float32, CPU, quantize=True)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_of_8_bits_is_near_that_of_its_weights(activation: str, clip: float | None, bias: bool) -> None:
    linear = Linear(64, 48, bias, activation=activation, clip=clip)
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, residual = torch.randn(5, 64), torch.randn(5, 48)
    with torch.inference_mode():
        expected = linear(x, residual.clone())
        linear.prepack(INT8)
        torch.testing.assert_close(linear(x, residual.clone()), expected, rtol=0, atol=0.03)
    assert linear.weight is None


def test_rounding_is_off_by_half_a_unit_at_most() -> None:
    weight = torch.randn(7, 33) * torch.logspace(-30, 3, 7)[:, None]
    weight[3] = 0
    units, scales = rounded(weight)
    assert units.dtype == torch.int8
    assert ((units * scales[:, None] - weight).abs() <= scales[:, None] * 0.501).all()


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}, {"learned_pos_emb": True}])
def test_a_model_of_8_bits_has_the_logits_of_its_rounded_weights(tmp_path: Path, fields: dict[str, bool]) -> None:
    """The checkpoint's other tensors are left as they are."""
    config = tiny_config({"alibi": "learned_pos_emb" not in fields}, **fields)
    weights = random_weights(config)
    make_checkpoint(tmp_path / "stored", config, weights)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            units, scales = rounded(tensor)
            weights[name] = units * scales[:, None]
    make_checkpoint(tmp_path / "rounded", config, weights)
    logits = []
    for folder, weight_format in (("stored", INT8), ("rounded", WeightFormat(torch.float32, CPU))):
        read = MPTConfig.from_file(tmp_path / folder / "config.json")
        logits.append(Stepper(load_model(tmp_path / folder, read, weight_format)).step({"a": random_tokens(20)})["a"])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


def test_random_weights_are_rounded_too() -> None:
    config = MPTConfig.from_dict(tiny_config())
    assert Stepper(random_model(config, INT8)).step({"a": [1, 2, 3]})["a"].isfinite().all()
