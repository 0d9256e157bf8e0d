"""Finds the folder of a checkpoint: the embedded demo model, a folder, or a Hugging Face hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mpt_grpc.errors import ModelError

DEMO = Path(__file__).parent / "demo"

# Never *.py: no code of a checkpoint is run, so none is fetched.
_PATTERNS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
_WEIGHTS = [
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
]


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, and the name that it is served under."""

    name: str
    folder: Path


def find_checkpoint(model: str, *, weights: bool = True) -> Checkpoint:
    """Finds `model`: 'demo', a folder, or a hub id, which is downloaded (or found in the hub's cache).

    `weights=False` leaves the tensors out. Raises ModelError when there is no such model.
    """
    if model == "demo":
        return Checkpoint("demo", DEMO)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"--model {model}: has no config.json: it needs that, tokenizer.json and the weights")
        return Checkpoint(folder.resolve().name, folder)
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(f"--model {model}: no such folder, and no hub id either (OWNER/NAME)")
    try:
        found = Path(snapshot_download(model, allow_patterns=_PATTERNS))
        for patterns in _WEIGHTS if weights else ():
            # Asked for even when files are there: a download that broke off goes on.
            snapshot_download(model, allow_patterns=patterns)
            if any(found.glob(patterns[0])):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"--model {model}: no such folder, and the hub did not give it: {error}") from error
    return Checkpoint(model, found)
