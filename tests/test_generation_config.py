"""Defaults of sampling options from a checkpoint's generation_config.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpt_grpc.errors import ModelError
from mpt_grpc.generation_config import generation_defaults
from mpt_grpc.request import GenerationDefaults


def defaults(folder: Path, **config: Any) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    return generation_defaults(folder)


def test_values_of_the_file_replace_the_servers(tmp_path: Path) -> None:
    given = {
        "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.95, "repetition_penalty": 1.1,
        "max_new_tokens": 64,
    }  # fmt: skip
    assert defaults(tmp_path, **given, do_sample=True) == GenerationDefaults(**given)


def test_values_that_the_file_does_not_set_stay_the_servers(tmp_path: Path) -> None:
    config = {"_from_model_config": True, "eos_token_id": 0, "top_p": None, "transformers_version": "4.28.1"}
    assert defaults(tmp_path, **config) == GenerationDefaults()


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    assert defaults(tmp_path, top_k=50.0, max_new_tokens=64.0) == GenerationDefaults(top_k=50, max_new_tokens=64)


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_k": 5}', encoding="utf-8-sig")
    assert generation_defaults(tmp_path).top_k == 5


def test_do_sample_false_is_greedy(tmp_path: Path) -> None:
    assert defaults(tmp_path, do_sample=False, temperature=0.7).temperature == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("min_p", "0.1"),
        ("max_new_tokens", True),
        ("do_sample", "false"),
        ("forced_eos_token_id", 0),
        ("forced_bos_token_id", 0),
        ("bad_words_ids", [[0]]),
    ],
)
def test_a_value_that_cannot_be_a_default_is_refused_with_its_field(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"generation_config.json: {name}: "):
        defaults(tmp_path, **{name: value})


def test_fields_that_are_not_implemented_are_refused_with_the_others_unless_they_are_off(tmp_path: Path) -> None:
    off = {"num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": [], "guidance_scale": None, "min_length": 0}
    assert defaults(tmp_path, **off, top_k=7) == GenerationDefaults(top_k=7)
    with pytest.raises(ModelError) as error:
        defaults(tmp_path, num_beams=4, stop_strings=["\n"], top_p=2, token_healing=True)
    out_of_range = "top_p: 2: expected a number in (0, 1]; 1 keeps all tokens"
    why = f"{out_of_range}; num_beams: 4: not supported as a default; stop_strings: ['\\n']: "
    assert f"generation_config.json: {why}" in str(error.value)
    assert str(error.value).endswith(
        "; token_healing: True: not supported as a default; change it or use --generation-config server"
    )


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no generation_config\.json"):
        generation_defaults(tmp_path)
    for text, reason in (("[1]", "not a JSON object"), ("[" * 100_000, "invalid JSON")):
        (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match=rf"generation_config\.json: {reason}"):
            generation_defaults(tmp_path)
