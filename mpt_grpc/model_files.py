"""The files in a model's folder: their names, where several modules need them, and how they are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from os.path import isfile
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
WEIGHT_FILES = tuple(name for layout in WEIGHT_LAYOUTS for name in layout)
LFS_POINTER = "version https://git-lfs."
"""How the small file begins that Git leaves in place of a large one."""
LFS_REMEDY = "it is a pointer of Git LFS to the file; run git lfs pull in the checkpoint's repository"
_MAX_NAME_BYTES = 255
_MAX_LISTED = 4
_MAX_NAMES = 1000
_OTHER_WEIGHTS = frozenset(".safetensors .bin .pt .pth .ckpt .distcp .gguf .ggml .h5 .msgpack .npz .nemo .onnx".split())
"""The suffixes of files in which weights may be that are not read."""
_EXPORTED = "is not read: use the checkpoint from which it was made"
_REMEDIES: Mapping[str, str] = {
    r"\.gguf$|ggml": f"llama.cpp's format {_EXPORTED}",
    r"\.onnx$": f"ONNX {_EXPORTED}",
    r"(^|/)openvino_": f"OpenVINO's format {_EXPORTED}",
    r"(gptq|awq|[-_][48]bit)[^/]*$": f"a quantized model {_EXPORTED}",
    r"-\d+-of-\d+\.(safetensors|bin)$": "the index of these shards is missing: download it, too",
    r"\.(pt|pth|ckpt|distcp)$": (
        "a training checkpoint is not read: convert it, that of llm-foundry with its convert_composer_to_hf.py"
    ),
}
"""What the names of weights that are not read say about them, and what to do."""


def has_file(path: Path) -> bool:
    """Whether there is a regular file. Raises ModelError for anything else of that name, such as a broken link."""
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


def names_in(folder: Path) -> list[str]:
    """Returns the names of the files in a folder and in its subfolders. Of a large folder, such as one that is not a
    model's, some are left out."""
    paths = (path for pattern in ("*", "*/*") for path in folder.glob(pattern))
    # Unlike Path.is_file, isfile raises no error where a folder must not be entered.
    return [str(path.relative_to(folder)) for path in islice(paths, _MAX_NAMES) if isfile(path)]


def why_no_weights(names: Iterable[str]) -> str:
    """Returns a remedy for a model whose files, with these names, include no weights that are read."""
    found = f"; {found}" if (found := found_weights(names)) else ""
    return f"no weights found; expected one of {', '.join(WEIGHT_FILES)}, as transformers saves them{found}"


def found_weights(names: Iterable[str]) -> str:
    """Returns which files have the weights of a model that cannot be read, with a remedy if one is known.

    The result is empty if there are no weights, or some that are read.
    """
    names = tuple(names)
    others = sorted(name for name in names if Path(name).suffix in _OTHER_WEIGHTS)
    if not others or not set(WEIGHT_FILES).isdisjoint(names):
        return ""
    remedy = next((f": {why}" for pattern, why in _REMEDIES.items() for n in others if re.search(pattern, n)), "")
    return f"found {', '.join(others[:_MAX_LISTED])}{remedy}"


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
