"""Locating a model's files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpt_grpc.checkpoint import find_checkpoint
from mpt_grpc.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_finds_the_demo_model_and_folders(tmp_path: Path) -> None:
    demo = find_checkpoint("demo")
    assert (demo.name, (demo.folder / "model.safetensors").is_file()) == ("demo", True)
    (tmp_path / "my-mpt").mkdir()
    with pytest.raises(ModelError, match=r"--model .*my-mpt: no config\.json; the folder must have it"):
        find_checkpoint(f"{tmp_path}/my-mpt")
    (tmp_path / "my-mpt" / "config.json").touch()
    assert find_checkpoint(f"{tmp_path}/my-mpt/").name == "my-mpt"


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_rejects_names_that_are_neither_folders_nor_hub_ids(model: str) -> None:
    with pytest.raises(ModelError, match=rf"--model {model}: no such folder, and not a Hub ID"):
        find_checkpoint(model)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_finds_a_hub_id_in_the_local_hub_cache(tmp_path: Path, weights: str) -> None:
    snapshot = tmp_path / "models--mosaicml--mpt-7b" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", weights):
        (snapshot / name).write_text("{}")
    (tmp_path / "models--mosaicml--mpt-7b" / "refs").mkdir()
    (tmp_path / "models--mosaicml--mpt-7b" / "refs" / "main").write_text(COMMIT)
    found = _find_offline("mosaicml/mpt-7b", tmp_path)
    assert found.stdout.split() == ["mosaicml/mpt-7b", str(snapshot)]


def test_unavailable_hub_id_raises_a_clear_error(tmp_path: Path) -> None:
    failed = _find_offline("nobody/nothing", tmp_path)
    assert failed.returncode == 1
    assert "ModelError: --model nobody/nothing: no such folder, and not available from the Hub" in failed.stderr


def _find_offline(model: str, cache: Path) -> subprocess.CompletedProcess[str]:
    code = f"from mpt_grpc.checkpoint import *; c = find_checkpoint({model!r}); print(c.name, c.folder)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
