"""The sampling defaults in a checkpoint's generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path

from mpt_grpc.errors import ModelError
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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"--generation-config model: {folder} has no generation_config.json; use server") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    given = {name: config[name] for name in _RANGES if config.get(name) is not None}
    if config.get("do_sample") is False:
        given["temperature"] = 0
    for name, value in given.items():
        kind, low, high = _RANGES[name]
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
            raise ModelError(f"{path}: {name}: {value!r} is out of range")
    return GenerationDefaults(**given)
