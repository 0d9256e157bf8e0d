"""Reads tensors one at a time from memory-mapped safetensors and PyTorch zip files.

PyTorch files are read with `weights_only=True`, so torch rejects any other content of a pickle and never executes it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpt_grpc.errors import WeightsError


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and tensors of all files. Raises WeightsError naming the file that cannot be read."""
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    for name in opened.offset_keys():
                        yield name, opened.get_tensor(name)
            else:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                if not isinstance(state, dict) or not all(
                    isinstance(value, Tensor) and value.layout is torch.strided for value in state.values()
                ):
                    raise WeightsError(f"{file}: expected a mapping of names to dense tensors")
                for name in state:
                    yield name, state[name]
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
            raise WeightsError(f"cannot read {file}: {error}") from error
