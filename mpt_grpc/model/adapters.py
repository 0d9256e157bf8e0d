"""LoRA adapters as PEFT saves them, merged into a model's weights as these are loaded.

An adapter adds scale · B A to the weight of a layer, or replaces parameters. The result is that of PEFT's
`merge_and_unload`, except that it is rounded only once, to the type in which the model is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpt_grpc.errors import WeightsError
from mpt_grpc.model.adapter_config import ADAPTABLE, EMBEDDINGS, AdapterConfig
from mpt_grpc.model.tensor_files import read_tensors
from mpt_grpc.model_files import has_file

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_ADAPTABLE = ", ".join(ADAPTABLE)
_MAX_LISTED = 4


@dataclass(frozen=True)
class _Update:
    """scale · B A, with A [rank, d_in] and B [d_out, rank]."""

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes, by the names of the parameters in a checkpoint."""

    updates: Mapping[str, _Update]
    replacements: Mapping[str, Tensor]

    @classmethod
    def from_folder(cls, folder: Path, shapes: Mapping[str, torch.Size]) -> Adapter:
        """Reads an adapter of a model whose parameters have these shapes.

        Raises ConfigError with every unsupported field, and WeightsError with the tensors that do not fit the model.
        """
        config = AdapterConfig.from_file(folder / "adapter_config.json")
        file = next((folder / name for name in _FILES if has_file(folder / name)), None)
        if file is None:
            raise WeightsError(f"--adapter {folder}: no weights; expected {' or '.join(_FILES)}")
        # PEFT wraps the layers that it adapts, and calls the original layer base_layer.
        tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in read_tensors([file])}
        obstacles = list(_obstacles(config, tensors, shapes))
        if obstacles:
            more = len(obstacles) - _MAX_LISTED
            listed = "; ".join(obstacles[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
            raise WeightsError(f"{file}: {listed}")
        updates = {}
        for module in _adapted(config, shapes):
            a, b = (tensors[name] for name in _factors(module))
            if _is_embedding(module):
                a, b = a.T, b.T
            updates[f"{module}.weight"] = _Update(a, b, config.scale_of(module))
        return cls(updates, {name: tensors[_PREFIX + name] for name in shapes if _PREFIX + name in tensors})

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a parameter with the adapter merged, computed in float32, or in float64 if `tensor` is float64."""
        update, replacement = self.updates.get(name), self.replacements.get(name)
        if update is None and replacement is None:
            return tensor
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        weight = (tensor if replacement is None else replacement).to(dtype, copy=True)
        if update is not None:
            weight.addmm_(update.B.to(dtype), update.A.to(dtype), alpha=update.scale)
        return weight


def _adapted(config: AdapterConfig, shapes: Mapping[str, torch.Size]) -> list[str]:
    modules = (name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
    return [module for module in modules if config.adapts(module)]


def _factors(module: str) -> tuple[str, str]:
    """Returns the names of A and B. PEFT stores those of an embedding transposed, each under the other's name."""
    prefix = f"{_PREFIX}{module}.lora_"
    if _is_embedding(module):
        return f"{prefix}embedding_B", f"{prefix}embedding_A"
    return f"{prefix}A.weight", f"{prefix}B.weight"


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in EMBEDDINGS


def _obstacles(config: AdapterConfig, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Iterator[str]:
    expected: dict[str, tuple[float, ...]] = {_PREFIX + name: tuple(shape) for name, shape in shapes.items()}
    required = [_PREFIX + name for name in shapes if config.replaces(name)]
    for module in (adapted := _adapted(config, shapes)):
        (d_out, d_in), rank, (a, b) = shapes[f"{module}.weight"], config.rank_of(module), _factors(module)
        expected |= (
            {a: (d_in, rank), b: (rank, d_out)} if _is_embedding(module) else {a: (rank, d_in), b: (d_out, rank)}
        )
        required += [a, b]
    if not adapted:
        yield f"target_modules of adapter_config.json match none of the model's {_ADAPTABLE}"
    for name in required:
        if name not in tensors:
            yield f"tensor {name!r} is missing"
    tied = (f"{_PREFIX}lm_head.", f"{_PREFIX}transformer.wte.") if "lm_head.weight" not in shapes else ()
    for name, tensor in tensors.items():
        if name.startswith(tied):
            why = "the embedding is also the output layer; supported if config.json sets tie_word_embeddings to false"
            yield f"tensor {name!r}: {why}"
        elif name not in expected:
            why = f"supported: parameters of the model, and updates of {_ADAPTABLE} that target_modules selects"
            yield f"tensor {name!r} is unexpected; {why}"
        elif tuple(tensor.shape) != expected[name]:
            yield f"tensor {name!r} has shape {list(tensor.shape)}, not {list(expected[name])}"
        elif not tensor.is_floating_point():
            yield f"tensor {name!r} has type {tensor.dtype}; supported: floating-point types"
