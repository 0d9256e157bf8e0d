"""Loads a checkpoint's tensors into the model one at a time, so that peak memory is the model plus one tensor.

The weights are in a single file, or in shards with an index. Adapters are merged into each tensor as it is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from mpt_grpc.errors import WeightsError
from mpt_grpc.model.adapters import Adapter
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.linear import Embedding, Linear, Norm, WeightFormat
from mpt_grpc.model.mpt import MPT
from mpt_grpc.model.published_names import is_without_effect, renamed_tensor, why_foreign
from mpt_grpc.model.tensor_files import read_tensors
from mpt_grpc.model_files import WEIGHT_LAYOUTS, has_file, names_in, shard_names, why_no_weights

_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_COMPARE = "check that config.json is that of these weights"


def load_model(folder: Path, config: MPTConfig, weight_format: WeightFormat, adapters: Sequence[Adapter] = ()) -> MPT:
    """Loads the checkpoint in `folder`, with the adapters merged in turn.

    Raises WeightsError naming the tensor if one is missing, unexpected or has the wrong shape.
    """
    return _fill(config, _stored(folder), weight_format, adapters)


def random_model(config: MPTConfig, weight_format: WeightFormat) -> MPT:
    """Returns a model with random weights that keep activations finite, for benchmarks without a checkpoint."""
    dtype, device = weight_format.dtype, weight_format.device
    generator = torch.Generator(device).manual_seed(0)

    def tensor(name: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        std = 0.02 if name == _EMBEDDING else shape[1] ** -0.5
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)

    return _fill(
        config, ((name, tensor(name, shape)) for name, shape in parameter_shapes(config).items()), weight_format
    )


def parameter_shapes(config: MPTConfig) -> dict[str, torch.Size]:
    """Returns the shapes of a model's parameters, by their names in a checkpoint."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in MPT(config).named_parameters()}


def num_parameters(config: MPTConfig) -> int:
    """Returns the number of parameters of a model."""
    return sum(shape.numel() for shape in parameter_shapes(config).values())


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns the checkpoint's tensors by name, mapped from the files into memory. Raises WeightsError."""
    tensors = dict(_stored(folder))
    return tensors if _EMBEDDING in tensors else {**tensors, _EMBEDDING: tensors[_HEAD]}


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    return ((renamed_tensor(name), tensor) for name, tensor in read_tensors(weight_files(folder)))


def weight_files(folder: Path) -> list[Path]:
    """Returns the weight files in order. Raises WeightsError naming the missing file if there is one."""
    for single, index in WEIGHT_LAYOUTS:
        # As transformers does: an index beside a complete file is a leftover.
        if has_file(folder / single):
            return [folder / single]
        if has_file(folder / index):
            names = shard_names(folder / index)
            for name in names:
                if not has_file(folder / name):
                    raise WeightsError(f"{folder / index}: shard {name!r} is not in the folder; download it")
            return [folder / name for name in names]
    raise WeightsError(f"{folder}: {why_no_weights(names_in(folder))}")


def _fill(
    config: MPTConfig,
    tensors: Iterable[tuple[str, Tensor]],
    weight_format: WeightFormat,
    adapters: Sequence[Adapter] = (),
) -> MPT:
    with torch.device("meta"):
        model = MPT(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    dtype, item_bytes = weight_format.dtype, weight_format.stored_dtype.itemsize
    total_bytes = sum(shape.numel() for shape in expected.values()) * item_bytes
    missing = set(expected)
    with _progress(total_bytes) as advance:
        for name, tensor in _with_tied_head(tensors, dtype) if config.tied_head else tensors:
            if name not in expected:
                if is_without_effect(name):
                    continue
                raise WeightsError(f"tensor {name!r} is not part of this model; {_why_unexpected(name, expected)}")
            if name not in missing:
                raise WeightsError(f"tensor {name!r} is stored twice")
            if not tensor.is_floating_point():
                why = "supported: floating-point types; use the checkpoint from which quantized weights were made"
                raise WeightsError(f"tensor {name!r} has type {tensor.dtype}; {why}")
            _check_shape(name, tensor, expected[name])
            for adapter in adapters:
                tensor = adapter.merged(name, tensor)
            _set(model, name, tensor, weight_format)
            missing.remove(name)
            advance(tensor.numel() * item_bytes)
    if missing:
        why = f"{len(missing)} missing in total; {_COMPARE}"
        raise WeightsError(f"tensor {min(missing)!r} is missing; {why}")
    model.transformer.prepack(weight_format)
    model.weight_format = weight_format
    return model.eval()


def _with_tied_head(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields the embedding once, whether it is stored by its own name, by that of the output layer, or by both.

    Raises WeightsError if the two differ by more than rounding to the type in which the model is computed.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name in (_HEAD, _EMBEDDING):
            stored[name] = tensor
        if name != _HEAD:
            yield name, tensor
    head, embedding = stored.get(_HEAD), stored.get(_EMBEDDING)
    if head is not None and embedding is None:
        yield _EMBEDDING, head
    elif head is not None and embedding is not None:
        _check_shape(_HEAD, head, embedding.shape)
        coarsest = min(head.dtype, embedding.dtype, dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(embedding.to(coarsest), head.to(coarsest)):
            why = "config.json sets tie_word_embeddings to true, which is also the default"
            raise WeightsError(f"tensor {_HEAD!r} differs from {_EMBEDDING!r}, but {why}")


def _check_shape(name: str, tensor: Tensor, expected: torch.Size) -> None:
    if tensor.shape != expected:
        why = (
            _COMPARE if tensor.numel() else "it is empty; gather the parameters before saving, as zero_to_fp32.py does"
        )
        raise WeightsError(f"tensor {name!r} has shape {list(tensor.shape)}, not {list(expected)}; {why}")


def _why_unexpected(name: str, expected: Collection[str]) -> str:
    if name.endswith(".bias") and name.removesuffix("bias") + "weight" in expected:
        return "config.json sets no_bias to true, which is also the default"
    return why_foreign(name) or _COMPARE


def _set(model: nn.Module, name: str, tensor: Tensor, weight_format: WeightFormat) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if weight_format.kernels is not None and tensor.ndim == 2:
        # Packed from the file, and rounded to 8 bits from what is stored.
        rounds_from = tensor.dtype if tensor.dtype == torch.bfloat16 else torch.float32
        kept = tensor.to(rounds_from if weight_format.quantize else weight_format.dtype)
    elif weight_format.quantize and tensor.ndim == 2:
        kept = tensor.to(weight_format.device)
    else:
        dtype = weight_format.dtype if weight_format.kernels is None else torch.float32
        # Copied, so that the file can be unmapped.
        kept = torch.empty(tensor.shape, dtype=dtype, device=weight_format.device).copy_(tensor)
    module.register_parameter(leaf, nn.Parameter(kept, requires_grad=False))
    if leaf == "weight":
        assert isinstance(module, Embedding | Linear | Norm)
        module.prepack(weight_format)


def _progress(total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
    """Shows a progress bar on a terminal, or prints a line per quarter elsewhere; models below 100 MiB show nothing."""
    if total_bytes < 100 << 20:
        return nullcontext(lambda _: None)
    return _Bar(total_bytes) if sys.stderr.isatty() else nullcontext(_Lines(total_bytes))


class _Bar(AbstractContextManager[Callable[[int], None]]):
    def __init__(self, total_bytes: int) -> None:
        self._progress = Progress(transient=True)
        self._task = self._progress.add_task("loading weights", total=total_bytes)

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        return lambda num_bytes: self._progress.advance(self._task, num_bytes)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


class _Lines:
    def __init__(self, total_bytes: int) -> None:
        self._total_bytes, self._done, self._quarters = total_bytes, 0, 0

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._done * 4 // self._total_bytes > self._quarters:
            self._quarters = self._done * 4 // self._total_bytes
            print(f"loading weights: {self._quarters * 25}%", file=sys.stderr, flush=True)
