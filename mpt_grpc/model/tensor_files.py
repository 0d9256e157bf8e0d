"""Reads tensors one at a time from memory-mapped safetensors and PyTorch files.

PyTorch files are read with `weights_only=True`, so torch rejects any other content of a pickle and never executes it.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpt_grpc.errors import WeightsError
from mpt_grpc.model_files import LFS_POINTER, LFS_REMEDY

_ZIP = b"PK\x03\x04"
_SAVE = "save a state_dict of tensors alone, with torch.save"
_REFUSALS = {
    r"Unsupported global: GLOBAL ([\w.]{1,200})": f"it contains {{}}, which is not read; {_SAVE}",
    rf"Unsupported operand {pickle.FRAME[0]}\b": "its pickle has protocol 4 or later; torch.save writes 2",
}
"""What is wrong with a whole file that torch refuses, by what torch says of it."""


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and tensors of all files. Raises WeightsError naming the file that cannot be read."""
    for file in files:
        try:
            yield from _safetensors(file) if file.suffix == ".safetensors" else _pytorch(file)
        except (WeightsError, MemoryError):
            raise
        except Exception as error:  # of any class: the libraries read as far as a damaged file makes sense
            raise WeightsError(f"cannot read {file}: {_reason(file, error)}") from error


def _safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.offset_keys():
            yield name, opened.get_tensor(name)


def _pytorch(file: Path) -> Iterator[tuple[str, Tensor]]:
    # Before version 1.6, PyTorch saved no zip files, which are the only ones that it maps into memory.
    is_zip = _beginning(file).startswith(_ZIP)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error says what to do
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    entries: dict[Any, Any] = state if isinstance(state, dict) else {None: state}
    for name, value in entries.items():
        if not isinstance(name, str) or not (_is_dense(value) or value is None):
            nested = next(_nested(entries), None)
            remedy = f"; save its {nested} alone" if nested else ""
            raise WeightsError(f"{file}: expected a mapping of names to dense tensors{remedy}")
    # Parameters are tensors that require a gradient.
    yield from ((name, value.detach()) for name, value in entries.items() if value is not None)


def _nested(entries: Mapping[Any, Any]) -> Iterator[str]:
    """Yields where the mappings inside of a mapping are that contain tensors, such as ['state']['model']."""
    for name, value in entries.items():
        if isinstance(value, dict):
            inside = [""] if any(map(_is_dense, value.values())) else _nested(value)
            yield from (f"[{name!r}]{rest}" for rest in inside)


def _is_dense(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_nested or value.is_quantized)
    )


def _beginning(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER))


def _reason(file: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        beginning = _beginning(file)
    except OSError as unreadable:  # which safetensors reports without the reason
        return unreadable.strerror or str(unreadable)
    if beginning == LFS_POINTER.encode():
        return LFS_REMEDY
    if not beginning:
        return "the file is empty"
    for pattern, why in _REFUSALS.items():
        if found := re.search(pattern, str(error)):
            return why.format(*found.groups())
    if isinstance(error, RuntimeError | SafetensorError):
        text = re.sub(r"^\[.*?\] \. ", "", " ".join(str(error).split()))  # without the line of torch's code
        return f"{text.partition('. ')[0]}; download or save it again"
    return f"it contains other objects than tensors, or it is damaged; {_SAVE}, or download it again"
