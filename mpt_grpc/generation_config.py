"""The sampling defaults in a checkpoint's generation_config.json."""

from __future__ import annotations

from pathlib import Path

from mpt_grpc.errors import ModelError
from mpt_grpc.model_files import read_json
from mpt_grpc.request import GenerationDefaults

_RANGES: dict[str, tuple[type[int] | type[float], float, float]] = {
    "temperature": (float, 0, 100),
    "top_k": (int, 0, 1 << 31),
    "top_p": (float, 1e-9, 1),
    "min_p": (float, 0, 1),
    "typical_p": (float, 1e-9, 1),
    "repetition_penalty": (float, 1e-9, 10),
    "max_new_tokens": (int, 1, 1 << 31),
}


def generation_defaults(folder: Path) -> GenerationDefaults:
    """Returns the defaults in the folder's generation_config.json; fields that it does not set keep the server's.

    `do_sample: false` selects greedy decoding. Raises ModelError if the file is missing or a value is out of range.
    """
    path = folder / "generation_config.json"
    config = read_json(path)
    if config is None:
        raise ModelError(f"--generation-config model: {folder} has no generation_config.json; use server")
    given = {name: config[name] for name in _RANGES if config.get(name) is not None}
    if config.get("do_sample") is False:
        given["temperature"] = 0
    for name, value in given.items():
        kind, low, high = _RANGES[name]
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
            raise ModelError(f"{path}: {name}: {value!r} is out of range")
    return GenerationDefaults(**given)
