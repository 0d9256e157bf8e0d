"""A checkpoint in the layout of the published MPT models, with random weights; every peer's environment reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from numpy.typing import NDArray

Weights = NDArray[Any]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_CHUNK = 1 << 24
_SEED, _STANDARD_DEVIATION = 0, 0.02


@dataclass(frozen=True)
class Shape:
    """The size of a model: layers without biases, tied embeddings, ALiBi."""

    d_model: int
    n_layers: int
    n_heads: int
    vocab_size: int

    @property
    def name(self) -> str:
        return f"d{self.d_model}-l{self.n_layers}-h{self.n_heads}-v{self.vocab_size}"

    @property
    def num_layer_parameters(self) -> int:
        """The parameters of all layers, without the embedding."""
        return self.num_parameters - self.vocab_size * self.d_model

    @property
    def num_parameters(self) -> int:
        return sum(prod(shape) for shape in self.tensors().values())

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the tensors by their published names."""
        d = self.d_model
        tensors: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (self.vocab_size, d)}
        for layer in range(self.n_layers):
            block = f"transformer.blocks.{layer}"
            tensors |= {
                f"{block}.norm_1.weight": (d,),
                f"{block}.attn.Wqkv.weight": (3 * d, d),
                f"{block}.attn.out_proj.weight": (d, d),
                f"{block}.norm_2.weight": (d,),
                f"{block}.ffn.up_proj.weight": (4 * d, d),
                f"{block}.ffn.down_proj.weight": (d, 4 * d),
            }
        return tensors | {"transformer.norm_f.weight": (d,)}


def write(folder: Path, shape: Shape, tokenizer: Path) -> None:
    """Writes config.json, the tokenizer of another folder and random weights in bfloat16."""
    config = {
        "architectures": ["MPTForCausalLM"],
        "model_type": "mpt",
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "expansion_ratio": 4,
        "max_seq_len": 2048,
        "vocab_size": shape.vocab_size,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "learned_pos_emb": False,
        "attn_config": {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8, "clip_qkv": None},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name in _TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder)
    with (folder / "model.safetensors").open("wb") as file:
        _write_weights(file, shape.tensors())


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def read_weights(folder: Path) -> Iterator[tuple[str, Weights]]:
    """Yields the names and the weights, as the 16 bits of each bfloat16; see `as_float32`."""
    data = numpy.memmap(folder / "model.safetensors", numpy.uint8, mode="r")
    start = 8 + int(data[:8].view("<u8")[0])
    for name, tensor in json.loads(data[8:start].tobytes()).items():
        begin, end = tensor["data_offsets"]
        yield name, data[start + begin : start + end].view("<u2").reshape(tensor["shape"])


def as_float32(bits: Weights) -> Weights:
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def _write_weights(file: BinaryIO, tensors: Mapping[str, tuple[int, ...]]) -> None:
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    generator = numpy.random.default_rng(_SEED)
    for shape in tensors.values():
        remaining = prod(shape)
        is_norm = len(shape) == 1
        while remaining:
            num = min(remaining, _CHUNK)
            if is_norm:
                values = numpy.ones(num, numpy.float32)
            else:
                values = generator.standard_normal(num, numpy.float32) * numpy.float32(_STANDARD_DEVIATION)
            file.write((values.view(numpy.uint32) >> 16).astype("<u2").tobytes())  # rounds toward zero
            remaining -= num
