"""Locates a checkpoint: the built-in model, a local folder, or a Hugging Face Hub ID."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

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
    folder = path if is_folder else _download(model, revision, *_FILES)
    if not (has_config if is_folder else has_file(folder / "config.json")):
        why = _remedy(folder) if is_folder else _remedy_on_hub(folder, _names(model, folder.name))
        raise ModelError(f"--model {model}: no config.json; {why}")
    if is_folder:
        return Checkpoint(path.resolve().name, folder)
    commit = folder.name
    if not has_file(folder / "tokenizer.json"):
        tokenizer_files = (*SENTENCEPIECE_FILES, *BYTE_LEVEL_FILES)
        _download(model, commit, *tokenizer_files)
        if not any(has_file(folder / name) for name in tokenizer_files):
            _check_weights(model, _names(model, commit))
    return Checkpoint(model, folder, commit)


def download_weights(checkpoint: Checkpoint) -> None:
    """Downloads the weights of a model of the Hub unless they are in its cache. Raises ModelError."""
    if checkpoint.commit is None:
        return
    folder = checkpoint.folder
    for single, index in WEIGHT_LAYOUTS:
        _download(checkpoint.name, checkpoint.commit, single, index)
        if has_file(folder / single):
            return
        if has_file(folder / index):
            _download(checkpoint.name, checkpoint.commit, *shard_names(folder / index))
            return
    _check_weights(checkpoint.name, _names(checkpoint.name, checkpoint.commit))


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


def _names(model: str, commit: str) -> Sequence[str]:
    """Returns the names of the files in a repository of the Hub; none if the Hub does not respond."""
    try:
        return HfApi().list_repo_files(model, revision=commit)
    except Exception:  # also those of the Hub's HTTP library, which depends on its version
        return ()


def _download(model: str, revision: str | None, *names: str) -> Path:
    """Downloads the files with these names, if there are any; returns the folder in the Hub's cache."""
    if not sys.stderr.isatty():
        disable_progress_bars()  # one of them would appear in the log
    try:
        # The Hub's library warns if nothing matches, so config.json, which is cached by then, is always among them.
        return Path(snapshot_download(model, revision=revision, allow_patterns=["config.json", *names]))
    except Exception as error:  # also those of the Hub's HTTP library, which depends on its version
        raise _unavailable(model, revision, error) from error


def _unavailable(model: str, revision: str | None, error: Exception) -> ModelError:
    """Returns the error to report, which names the flag to change."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, RevisionNotFoundError):
        return ModelError(f"--revision {revision}: {model} has no such branch, tag or commit")
    at = "" if revision is None else f" --revision {revision}"
    if isinstance(cause, GatedRepoError):
        why = "its owner restricts access; request it on the model's page, and set HF_TOKEN"
    elif isinstance(cause, RepositoryNotFoundError):
        why = "no such folder, and no such model on the Hub; if it is private, set HF_TOKEN"
    elif isinstance(cause, OfflineModeIsEnabled):
        where = "not completely in the Hub's cache while HF_HUB_OFFLINE is set"
        why = f"no such folder, and {where}; download it once without"
    elif isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
        why = "the Hub refuses access; check HF_TOKEN"
    else:
        why = f"no such folder, and not available from the Hub: {' '.join(str(cause).split()) or repr(cause)}"
    return ModelError(f"--model {model}{at}: {why}")
