"""The files in a model's folder: their names, where several modules need them, and how they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpt_grpc.errors import ModelError, WeightsError

SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model")
"""The names of a SentencePiece model, which matters only where there is no tokenizer.json."""
BYTE_LEVEL_FILES = ("vocab.json", "merges.txt")
"""The names of a byte-level tokenizer's vocabulary and merges, which matter only without either of the others."""
WEIGHT_LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""The weights as a single file, and the index of weights in shards; the first layout in the folder is loaded."""
LFS_POINTER = "version https://git-lfs."
"""How the small file begins that Git leaves in place of a large one."""
LFS_REMEDY = "it is a pointer of Git LFS to the file; run git lfs pull in the checkpoint's repository"
_MAX_NAME_BYTES = 255


def has_file(path: Path) -> bool:
    """Whether there is a regular file. Raises ModelError for what only has its name, such as a link to nothing."""
    try:
        if path.is_file():
            return True
        if path.exists():
            # Reading from a pipe or a device might wait forever.
            raise ModelError(f"{path}: not a regular file; replace it by the file of the model")
        if path.is_symlink():
            why = "which does not exist; download the model again"
            raise ModelError(f"{path}: a symbolic link to {path.readlink()}, {why}")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    return False


def read_text(path: Path) -> str | None:
    """Returns the text of the file, or None if it does not exist. Raises ModelError."""
    if not has_file(path):
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    if text.startswith(LFS_POINTER):
        raise ModelError(f"{path}: cannot be read: {LFS_REMEDY}")
    if not text.strip():
        raise ModelError(f"{path}: the file is empty; download it again")
    return text


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in the file, or None if it does not exist. Raises ModelError."""
    text = read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def shard_names(index: Path) -> list[str]:
    """Returns the names of the shards in an index of weights, in order. Raises ModelError."""
    weight_map = (read_json(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: not a shard index: weight_map must be a JSON object")
    names = set()
    for name in weight_map.values():
        plain = str(Path(name)) if isinstance(name, str) else ""  # without a leading ./
        if not plain or Path(plain).name != plain or len(plain.encode(errors="replace")) > _MAX_NAME_BYTES:
            raise WeightsError(f"{index}: shard {name!r} is not in the folder")
        names.add(plain)
    return sorted(names)
