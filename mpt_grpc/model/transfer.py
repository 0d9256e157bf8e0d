"""Transfers from the host to the device that computes; on an accelerator the host does not wait for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the CPU on the device."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def overwrite(target: Tensor, tensor: Tensor) -> None:
    """Copies a tensor of the CPU into one on a device."""
    target.copy_(_pinned(tensor, target.device), non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor in memory from which a copy to the device need not wait for all work that is queued."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def send_all(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Returns arrays as tensors on the device: on an accelerator in one transfer, on the CPU without a copy."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return split_like(send(flattened(arrays), device), arrays)


def flattened(arrays: Sequence[NDArray[np.int64]]) -> Tensor:
    """Returns the items of all arrays, one array after the other, on the CPU."""
    return torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))


def split_like(flat: Tensor, arrays: Sequence[NDArray[np.int64]]) -> list[Tensor]:
    """Returns the parts of `flattened` arrays in their shapes; they share its memory."""
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
