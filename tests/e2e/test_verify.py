"""`mpt-grpc verify` accepts sound checkpoints of every kind, and names what is wrong with others."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import save_adapter, transformers_model
from model.conftest import make_checkpoint, random_weights, tiny_config
from safetensors.torch import load_file, save_file

import mpt_grpc
from mpt_grpc.checkpoint import find_checkpoint
from mpt_grpc.settings import ModelSettings
from mpt_grpc.verification.check import Check
from mpt_grpc.verification.checks import checks
from mpt_grpc.verification.text_checks import text_checks

DEMO = Path(mpt_grpc.__file__).parent / "demo"
FLOAT32 = "--dtype=float32"


def verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "mpt_grpc.cli", "verify", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def copy_of_demo(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Copies the built-in model, with an edited config.json."""
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def failures(model: Path) -> dict[str, str]:
    """Returns the details of the checks that fail, by name."""
    return {c.name: c.detail for c in checks(ModelSettings(model=str(model), dtype="float32")) if not c.passed}


def by_name(model: Path) -> dict[str, Check]:
    return {check.name: check for check in checks(ModelSettings(model=str(model), dtype="float32"))}


@pytest.fixture(scope="module")
def sound() -> subprocess.CompletedProcess[str]:
    """The result for the built-in model."""
    return verify(FLOAT32)


def test_the_built_in_model_passes_every_check(sound: subprocess.CompletedProcess[str]) -> None:
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert not sound.stderr
    verdicts = {line[:17].strip(): line[19:26].strip() for line in sound.stdout.splitlines()}
    assert verdicts == {
        "token IDs": "same",
        "text of tokens": "same",
        "chat template": "skipped",
        "weights": "ok",
        "plausibility": "ok",
        "float64 reference": "same",
        "transformers": "same",
    }
    assert "32 of 32 greedy tokens are the most likely" in sound.stdout


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config["attn_config"].update(clip_qkv=0.01),
        lambda config: config.update(logit_scale=-1),
    ],
)
def test_weights_of_another_config_are_implausible(tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    assert set(failures(copy_of_demo(tmp_path / "edited", edit))) == {"plausibility"}


def test_weights_of_another_tokenizer_are_implausible(tmp_path: Path) -> None:
    model = copy_of_demo(tmp_path / "renumbered", lambda _: None)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary, special = tokenizer["model"]["vocab"], {token["content"] for token in tokenizer["added_tokens"]}
    ids = {text: token_id for text, token_id in vocabulary.items() if text not in special}
    vocabulary |= dict(zip(ids, reversed(ids.values()), strict=True))
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert set(failures(model)) == {"plausibility"}


def test_a_failure_is_told_by_the_exit_status(tmp_path: Path) -> None:
    broken = copy_of_demo(tmp_path / "broken", lambda config: config.update(n_layers=9))
    ended = verify(FLOAT32, "--model", str(broken))
    assert ended.returncode == 1
    assert "checkpoint         FAILED   tensor 'transformer.blocks.8" in ended.stdout
    assert ended.stderr == "mpt-grpc: the checkpoint fails: checkpoint\n"


def test_weights_that_are_not_finite_fail(tmp_path: Path) -> None:
    broken = copy_of_demo(tmp_path / "broken", lambda _: None)
    tensors = load_file(broken / "model.safetensors")
    tensors["transformer.blocks.3.ffn.up_proj.weight"][7, 7] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert re.fullmatch("the model's .* are not finite", failures(broken)["checkpoint"])


@pytest.mark.parametrize(
    "config",
    [
        tiny_config({"rope": True, "sliding_window_size": 20}, norm_type="rmsnorm", vocab_size=4096),
        tiny_config({"alibi_bias_max": 16, "qk_ln": True}, no_bias=False, vocab_size=4096, max_seq_len=256),
        tiny_config(ffn_config={"ffn_type": "mptglu"}, tie_word_embeddings=False, vocab_size=4096),
        tiny_config(norm_eps=0.1, vocab_size=4096, max_seq_len=20),
    ],
)
def test_variants_that_transformers_ignores_are_compared_with_the_reference(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    model = copy_of_demo(tmp_path / "variant", lambda _: None)
    make_checkpoint(model, config, random_weights(config))
    found = by_name(model)
    assert found["float64 reference"].verdict == "same"
    assert found["transformers"].verdict == "skipped"
    assert not found["plausibility"].passed, "the weights are random"


def test_numbers_of_other_types_than_in_transformers_are_compared_with_it(tmp_path: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["expansion_ratio"] = 4.0
        config["attn_config"] |= {"clip_qkv": 1000, "attn_pdrop": 0.0}

    found = by_name(copy_of_demo(tmp_path / "typed", edit))
    assert [found[name].verdict for name in ("token IDs", "transformers")] == ["same", "same"]


def test_the_class_of_the_tokenizer_may_be_named_by_the_configuration(tmp_path: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"

    model = copy_of_demo(tmp_path / "model", edit)
    (model / "tokenizer_config.json").unlink()
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True  # which the class of MPT's tokenizers would replace
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = {check.name: check for check in text_checks(ModelSettings(model=str(model)), find_checkpoint(str(model)))}
    assert found["token IDs"].verdict == "same"


def test_a_checkpoint_that_transformers_refuses_is_compared_with_the_reference(tmp_path: Path) -> None:
    found = by_name(copy_of_demo(tmp_path / "refused", lambda config: config.update(use_cache="yes")))
    assert all(check.passed for check in found.values())
    assert (found["transformers"].verdict, found["float64 reference"].verdict) == ("skipped", "same")
    assert "use_cache" in found["transformers"].detail


def test_mosaic_gpt_is_compared_with_the_reference(tmp_path: Path) -> None:
    def rename(config: dict[str, Any]) -> None:
        del config["attn_config"]
        config.update(model_type="mosaic_gpt", alibi=True)

    found = by_name(copy_of_demo(tmp_path / "mosaic", rename))
    assert all(check.passed for check in found.values())
    assert (found["transformers"].verdict, found["float64 reference"].verdict) == ("skipped", "same")


@pytest.mark.parametrize("is_same", [True, False])
@pytest.mark.parametrize("selected", ["auto", "default", "rag"])
def test_the_checkpoints_own_chat_template_is_compared(tmp_path: Path, is_same: bool, selected: str) -> None:
    model = copy_of_demo(tmp_path / "chat", lambda _: None)
    turns = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    text = turns if is_same else f"{turns}{{{{ strftime_now('%f') }}}}"  # the microsecond of rendering
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text(text if selected == "rag" else "other")
    (model / "chat_template.jinja").write_text("other" if selected == "rag" else text)
    wanted, checkpoint = ModelSettings(model=str(model), chat_template=selected), find_checkpoint(str(model))
    verdicts = {check.name: check.verdict for check in text_checks(wanted, checkpoint)}
    assert verdicts["chat template"] == ("same" if is_same else "DIFFERS")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Returns an adapter that changes the built-in model a little."""
    return save_adapter(tmp_path / "adapter", transformers_model(DEMO), std=0.02, target_modules="all-linear")


def test_a_merged_adapter_is_compared_with_the_reference_and_with_peft(
    adapter: Path, sound: subprocess.CompletedProcess[str]
) -> None:
    ended = verify(FLOAT32, "--adapter", str(adapter))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not ended.stderr
    for name in ("float64 reference", "transformers"):
        assert re.search(rf"^{name} +same ", ended.stdout, re.MULTILINE)
    nats = [re.findall(r"[\d.]+ nats", process.stdout) for process in (ended, sound)]
    assert nats[0] != nats[1], "the adapter changes the model"


def test_without_peft_the_comparison_with_it_is_skipped(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    found = {check.name: check for check in checks(ModelSettings(adapters=(adapter,), dtype="float32"))}
    assert found["float64 reference"].verdict == "same"
    assert (found["transformers"].verdict, "requires peft" in found["transformers"].detail) == ("skipped", True)


def test_an_adapter_that_cannot_be_merged_fails(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    *_, failed = checks(ModelSettings(adapters=(adapter,), dtype="float32"))
    assert (failed.name, failed.passed) == ("checkpoint", False)
    assert failed.detail.startswith(f"{file}: use_dora: True: would need DoRA; supported: false or null")
