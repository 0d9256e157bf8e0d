"""Adapters saved and merged by PEFT, which is the oracle."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from model.conftest import Format
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import MptForCausalLM


def save_adapter(
    folder: Path,
    model: nn.Module,
    *,
    seed: int = 1,
    format: Format = "safetensors",  # noqa: A002
    std: float = 0.1,
    **config: Any,
) -> Path:
    """Saves a LoRA adapter of `model` with PEFT, with random weights of a scale that changes the output."""
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(init_lora_weights=False, **{"target_modules": ["Wqkv"], **config}))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * std)
    peft.save_pretrained(folder, safe_serialization=format == "safetensors")
    return folder


def transformers_model(checkpoint: Path) -> MptForCausalLM:
    """Loads a checkpoint in float32."""
    return MptForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def merged_by_peft(model: nn.Module, adapters: Iterable[Path]) -> nn.Module:
    """Returns the model with the adapters merged in turn."""
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model
