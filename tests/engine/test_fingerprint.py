"""The fingerprint changes with everything that may change a token, and with nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import demo_settings
from safetensors.torch import load_file, save_file

from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.fingerprint import SAMPLER_VERSION, differences, fingerprint
from mpt_grpc.engine.load import load_engine
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.native import available_instruction_sets, load_kernels
from mpt_grpc.request import GenerationDefaults, GenerationRequest, SamplingParameters, StoppingCriteria
from mpt_grpc.settings import ModelSettings

DEMO = Path(__file__).parents[2] / "mpt_grpc" / "demo"
TOKEN_IDS = (259, 460, 578, 12, 578, 12, 578, 491, 12, 276, 357, 275)
CPU = torch.device("cpu")


def taken(folder: Path, settings: ModelSettings | None = None, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "weight_format": WeightFormat(torch.float32, CPU, load_kernels()),
        "cache_dtype": torch.float32,
        "attention": "torch",
        "defaults": GenerationDefaults(),
        "max_context_tokens": 2048,
        "eos_token_ids": {2, 0},
        "chat_template": "base",
        "guards": (),
        **changes,
    }
    return fingerprint(settings or ModelSettings(), folder, **arguments)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def one_weight_changed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.norm_f.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")


def appended(name: str) -> Callable[[Path], None]:
    def append(folder: Path) -> None:
        with (folder / name).open("a", encoding="utf-8") as opened:
            opened.write("\n")

    return append


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (one_weight_changed, "model"),
        (appended("config.json"), "model"),
        (appended("tokenizer.json"), "text"),
        (appended("chat_template.jinja"), "text"),
        (appended("merges.txt"), "text"),
    ],
)
def test_the_files_that_tokens_depend_on_are_covered(folder: Path, change: Callable[[Path], None], part: str) -> None:
    before = taken(folder)
    assert taken(DEMO) == before
    change(folder)
    assert differences(before, taken(folder)) == [part]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"settings": ModelSettings(load_format="random")}, ["model"]),
        ({"chat_template": "chatml"}, ["text"]),
        ({"eos_token_ids": {0}}, ["text"]),
        ({"eos_token_ids": {0, 2}}, []),
        ({"defaults": GenerationDefaults(temperature=0.5)}, ["defaults"]),
        ({"max_context_tokens": 100}, ["defaults"]),
        ({"cache_dtype": torch.int8}, ["precision"]),
        ({"weight_format": WeightFormat(torch.bfloat16, CPU, load_kernels())}, ["precision"]),
        ({"weight_format": WeightFormat(torch.float32, CPU)}, ["numerics"]),
    ],
)
def test_the_settings_that_tokens_depend_on_are_covered(changes: dict[str, Any], parts: list[str]) -> None:
    assert differences(taken(DEMO), taken(DEMO, **changes)) == parts


@pytest.mark.parametrize("library", ["jinja2", "llguidance", "regex", "tokenizers"])
def test_the_versions_of_the_libraries_for_texts_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str
) -> None:
    before = taken(DEMO)
    installed = tmp_path / f"{library}-0.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: 0.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert differences(before, taken(DEMO)) == ["text"]


def test_the_content_of_a_guards_file_counts_and_not_its_path(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    for path, word in ((one, "fox"), (same, "fox"), (other, "crow")):
        path.write_text(word, encoding="utf-8")
    guarded = [taken(DEMO, guards=(f"words={path}",)) for path in (one, same, other)]
    assert guarded[0] == guarded[1]
    assert differences(guarded[0], guarded[2]) == differences(guarded[0], taken(DEMO)) == ["text"]


@pytest.mark.skipif(len(available_instruction_sets()) < 2, reason="one instruction set")
def test_the_instruction_set_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    best = taken(DEMO)
    monkeypatch.setenv("MPT_GRPC_ISA", available_instruction_sets()[-1])
    assert differences(best, taken(DEMO)) == ["numerics"]


def test_of_a_large_file_both_ends_the_size_and_samples_count(folder: Path) -> None:
    weights, size = folder / "model.safetensors", 65 << 20

    def with_byte_at(position: int, size: int = size) -> str:
        with weights.open("wb") as opened:
            opened.truncate(size)
            opened.seek(position)
            opened.write(b"x")
        return taken(folder)

    assert len({with_byte_at(position) for position in (0, size // 1023, size - 1)}) == 3
    assert with_byte_at(0) != with_byte_at(0, size + 1)


def test_a_change_of_the_tokens_comes_with_a_new_version_of_the_sampler(shared_engine: Engine) -> None:
    """If this fails because tokens were meant to change, raise SAMPLER_VERSION, and then take the new ones."""
    sampling = SamplingParameters(temperature=0.9, top_k=200, top_p=0.95, min_p=0.01, typical_p=0.95, seed=7)
    request = GenerationRequest("r", "Once upon a time", sampling, stopping=StoppingCriteria(max_new_tokens=12))
    assert (SAMPLER_VERSION, shared_engine.generate(request).token_ids) == (2, TOKEN_IDS)


def test_where_outputs_end_counts_whichever_file_has_it(folder: Path) -> None:
    settings = demo_settings(num_blocks=4)

    def loaded() -> str:
        return load_engine(replace(settings, model=replace(settings.model, model=str(folder))))[1].fingerprint

    before = loaded()
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 5]}', encoding="utf-8")
    assert differences(before, loaded()) == ["text"]
