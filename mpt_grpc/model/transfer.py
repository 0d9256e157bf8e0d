"""Transfers between the host and the device that computes. On an accelerator the host does not wait for those to the
device, and for one from there only when it reads what has arrived."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpt_grpc.errors import DeviceLostError

_MEMORY_ALLOCATION = 2
"""CUDA's number of an error after which the device works on: something other than a tensor did not fit in memory."""


@contextmanager
def device_errors() -> Iterator[None]:
    """Raises DeviceLostError where the accelerator has failed permanently, which any call may notice, and MemoryError
    where something does not fit in memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    except torch.AcceleratorError as error:
        if getattr(error, "error_code", None) == _MEMORY_ALLOCATION:
            raise MemoryError(str(error)) from error
        raise DeviceLostError(f"the accelerator has failed: {error}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch has no narrower class for it on a CPU
            raise
        raise MemoryError(str(error)) from error


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor of the CPU on the device."""
    return _pinned(tensor, device).to(device, non_blocking=True)


def overwrite(target: Tensor, tensor: Tensor) -> None:
    """Copies a tensor of the CPU into one on a device."""
    target.copy_(_pinned(tensor, target.device), non_blocking=True)


def fill_in(token_ids: Tensor, chosen: Tensor) -> None:
    """Overwrites pending tokens, which are ~i, with the i-th of those that the step before has chosen."""
    token_ids.copy_(torch.where(token_ids < 0, chosen[(~token_ids).clamp_(min=0)], token_ids))


class Receipt:
    """A tensor of a device on its way to the host; on a CPU, it is there."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._event = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[int]:
        """Returns the items of a tensor [n], once all work that was queued before it is done, but not later work."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.tolist()


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
