"""Locates a checkpoint: the built-in model, a local folder, or a Hugging Face Hub ID."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpt_grpc.errors import ModelError
from mpt_grpc.model_files import (
    BYTE_LEVEL_FILES,
    SENTENCEPIECE_FILES,
    WEIGHT_FILES,
    WEIGHT_LAYOUTS,
    found_weights,
    has_file,
    names_in,
    shard_names,
    why_no_weights,
)

DEMO = Path(__file__).parent / "demo"

# No *.py files: a checkpoint's code is never run, so it is not downloaded.
_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "adapter_config.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model's files, and the name under which the model is served."""

    name: str
    """For a model of the Hub, its ID."""
    folder: Path
    commit: str | None = None
    """The commit of the Hub's repository; None for a model that is not from the Hub."""


def find_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Finds `model`: 'demo', a folder, or a Hub ID, whose files are downloaded unless they are in the Hub's cache.

    The weights are left to `download_weights`, so that a model that is refused for its small files costs no large
    download. `revision` is a branch, tag or commit of the Hub's repository. Raises ModelError if there is no such
    model.
    """
    if not model:
        raise ModelError("--model: empty; expected demo, a folder, or a Hub ID of the form OWNER/NAME")
    try:
        path = Path(model).expanduser()
        is_folder, is_there = path.is_dir(), path.exists()
        has_config = is_folder and has_file(path / "config.json")
    except (OSError, RuntimeError) as error:  # RuntimeError if there is no home folder for ~
        raise ModelError(f"--model {model}: {getattr(error, 'strerror', error)}") from error
    if revision is not None and (model == "demo" or is_folder):
        kind = "the built-in model" if model == "demo" else "a folder"
        raise ModelError(f"--revision {revision}: --model {model} is {kind}; only models of the Hub have revisions")
    if model == "demo":
        return Checkpoint("demo", DEMO)
    if is_there and not is_folder:
        raise ModelError(f"--model {model}: not a folder; use the folder that contains config.json and the weights")
    if not is_folder and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise ModelError(f"--model {model}: no such folder, and not a Hub ID of the form OWNER/NAME")
    if is_folder:
        if not has_config:
            raise ModelError(f"--model {model}: no config.json; {_remedy(path)}")
        return Checkpoint(path.resolve().name, path)
    from mpt_grpc import hub  # imports the Hub's library, which other models do not need

    folder = hub.download(model, revision, *_FILES)
    commit = folder.name
    if not has_file(folder / "config.json"):
        why = _remedy_on_hub(folder, hub.file_names(model, commit))
        raise ModelError(f"--model {model}: no config.json; {why}")
    if not has_file(folder / "tokenizer.json"):
        tokenizer_files = (*SENTENCEPIECE_FILES, *BYTE_LEVEL_FILES)
        hub.download(model, commit, *tokenizer_files)
        if not any(has_file(folder / name) for name in tokenizer_files):
            _check_weights(model, hub.file_names(model, commit))
    return Checkpoint(model, folder, commit)


def download_weights(checkpoint: Checkpoint) -> None:
    """Downloads the weights of a model of the Hub unless they are in its cache. Raises ModelError."""
    if checkpoint.commit is None:
        return
    from mpt_grpc import hub

    folder = checkpoint.folder
    for single, index in WEIGHT_LAYOUTS:
        hub.download(checkpoint.name, checkpoint.commit, single, index)
        if has_file(folder / single):
            return
        if has_file(folder / index):
            hub.download(checkpoint.name, checkpoint.commit, *shard_names(folder / index))
            return
    _check_weights(checkpoint.name, hub.file_names(checkpoint.name, checkpoint.commit))


def _check_weights(model: str, names: Sequence[str]) -> None:
    """Raises ModelError if a model of the Hub, whose files have these names, has no weights that can be read."""
    if names and not any(name in names for name in WEIGHT_FILES):
        raise ModelError(f"--model {model}: {why_no_weights(names)}")


def _remedy(folder: Path) -> str:
    """Returns a remedy for a folder without config.json."""
    if (folder / "adapter_config.json").is_file():
        return f"it is an adapter: use --adapter {folder}, with its model as --model"
    if (folder / "snapshots").is_dir():
        return "it is a folder of the Hub's cache: use the model's ID, or one of the folders in snapshots"
    names = names_in(folder)
    inside = next((name for name in sorted(names) if name.endswith("/config.json")), None)
    return f"found {inside}: use the folder that contains it" if inside else _needed(names)


def _remedy_on_hub(folder: Path, names: Sequence[str]) -> str:
    """Returns a remedy for a model of the Hub without config.json, whose files have these names."""
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter: use --adapter with the folder into which you download it, with its model as --model"
    return _needed(names)


def _needed(names: Sequence[str]) -> str:
    found = found_weights(names)
    return f"a model needs it, its tokenizer's files and the weights{f'; {found}' if found else ''}"
