"""Locates a checkpoint: the built-in model, a local folder, or a Hugging Face Hub ID."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mpt_grpc.errors import ModelError

DEMO = Path(__file__).parent / "demo"

# No *.py files: a checkpoint's code is never run, so it is not downloaded.
_PATTERNS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]
_WEIGHTS = [
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model's files, and the name under which the model is served."""

    name: str
    folder: Path


def find_checkpoint(model: str, *, weights: bool = True) -> Checkpoint:
    """Finds `model`: 'demo', a folder, or a Hub ID, which is downloaded unless it is in the Hub's cache.

    With `weights=False` the weights are not downloaded. Raises ModelError if there is no such model.
    """
    if model == "demo":
        return Checkpoint("demo", DEMO)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(
                f"--model {model}: no config.json; the folder must have it, tokenizer.json and the weights"
            )
        return Checkpoint(folder.resolve().name, folder)
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(f"--model {model}: no such folder, and not a Hub ID of the form OWNER/NAME")
    try:
        found = Path(snapshot_download(model, allow_patterns=_PATTERNS))
        for patterns in _WEIGHTS if weights else ():
            # Called even if some files exist, to resume an interrupted download.
            snapshot_download(model, allow_patterns=patterns)
            if any(found.glob(patterns[0])):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"--model {model}: no such folder, and not available from the Hub: {error}") from error
    return Checkpoint(model, found)
