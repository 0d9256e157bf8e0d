"""The sampling defaults in a checkpoint's generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpt_grpc.errors import ModelError
from mpt_grpc.limits import RANGES, Range
from mpt_grpc.model_files import read_json
from mpt_grpc.request import GenerationDefaults

_RANGES: Mapping[str, Range] = {
    **{name: RANGES[f"sampling.{name}"] for name in ("temperature", "top_p", "min_p", "typical_p")},
    "repetition_penalty": RANGES["decoding.repetition_penalty"],
    "top_k": Range(0, 1 << 31),
    "max_new_tokens": Range(1, 1 << 31),
}
_INTEGERS = ("top_k", "max_new_tokens")
_UNSUPPORTED: dict[str, object] = {
    **dict.fromkeys("num_beams num_beam_groups encoder_repetition_penalty guidance_scale".split(), 1),
    **dict.fromkeys("no_repeat_ngram_size encoder_no_repeat_ngram_size epsilon_cutoff eta_cutoff".split(), 0),
    **dict.fromkeys("min_length min_new_tokens penalty_alpha diversity_penalty".split(), 0),
    **dict.fromkeys("bad_words_ids force_words_ids suppress_tokens begin_suppress_tokens".split()),
    **dict.fromkeys("forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty".split()),
    **dict.fromkeys("sequence_bias stop_strings top_h constraints dola_layers watermarking_config max_time".split()),
    "token_healing": False,
}
"""Fields that are not implemented as defaults, with the values that switch them off, besides null, false and empty."""


def generation_defaults(folder: Path) -> GenerationDefaults:
    """Returns the defaults in the folder's generation_config.json; fields that it does not set keep the server's.

    `do_sample: false` selects greedy decoding. Raises ModelError if the file is missing, or with every value that is
    out of range or not implemented.
    """
    path = folder / "generation_config.json"
    config = read_json(path)
    if config is None:
        raise ModelError(f"--generation-config model: {folder} has no generation_config.json; use server")
    given: dict[str, Any] = {name: _whole(config[name]) for name in _RANGES if config.get(name) is not None}
    samples = config.get("do_sample")
    if samples is False:
        given["temperature"] = 0
    obstacles = [f"{name}: {value!r}: {why}" for name, value in given.items() if (why := _range_violation(name, value))]
    if not isinstance(samples, bool | None):
        obstacles.append(f"do_sample: {samples!r}: expected true or false")
    for name, off in _UNSUPPORTED.items():
        value = config.get(name)
        if not (value is None or value is False or value in ("", [], {}) or value == off):
            obstacles.append(f"{name}: {value!r}: not supported as a default")
    if obstacles:
        raise ModelError(f"{path}: {'; '.join(obstacles)}; change it or use --generation-config server")
    return GenerationDefaults(**given)


def _whole(value: object) -> object:
    """Returns 50.0 as 50."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _range_violation(name: str, value: Any) -> str | None:
    is_integer, allowed = name in _INTEGERS, _RANGES[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and value in allowed and not (is_integer and value % 1):
        return None
    return f"expected {'an integer' if is_integer else 'a number'} in {allowed}"
