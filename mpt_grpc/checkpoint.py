"""Locates a checkpoint: the built-in model, a local folder, or a Hugging Face Hub ID."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
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
from mpt_grpc.model_files import BYTE_LEVEL_FILES, SENTENCEPIECE_FILES, WEIGHT_LAYOUTS, has_file, shard_names

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
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model's files, and the name under which the model is served."""

    name: str
    folder: Path


def find_checkpoint(model: str, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
    """Finds `model`: 'demo', a folder, or a Hub ID, whose files are downloaded unless they are in the Hub's cache.

    `revision` is a branch, tag or commit of the Hub's repository. With `weights=False` the weights are not downloaded.
    Raises ModelError if there is no such model.
    """
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
    if not is_folder and (is_there or model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise ModelError(f"--model {model}: no such folder, and not a Hub ID of the form OWNER/NAME")
    folder = path if is_folder else _download(model, revision, weights)
    if not (has_config if is_folder else has_file(folder / "config.json")):
        raise ModelError(f"--model {model}: no config.json; {_remedy(folder)}")
    return Checkpoint(path.resolve().name if is_folder else model, folder)


def _remedy(folder: Path) -> str:
    """Returns what to do about a folder that is not a model's."""
    if (folder / "adapter_config.json").is_file():
        return f"it is an adapter: use --adapter {folder}, with its model as --model"
    return "a model needs it, its tokenizer's files and the weights"


def _download(model: str, revision: str | None, weights: bool) -> Path:
    """Returns the folder in the Hub's cache, after downloading what the loader reads and nothing else."""

    def fetch(revision: str | None, *names: str) -> Path:
        # The Hub's library warns if nothing matches, so config.json, which is cached by then, is always among them.
        return Path(snapshot_download(model, revision=revision, allow_patterns=["config.json", *names]))

    if not sys.stderr.isatty():
        disable_progress_bars()  # one of them would appear in the log
    try:
        folder = fetch(revision, *_FILES)
        commit = folder.name  # the branch may move between two downloads
        if not (folder / "tokenizer.json").is_file():
            fetch(commit, *SENTENCEPIECE_FILES, *BYTE_LEVEL_FILES)
        for single, index in WEIGHT_LAYOUTS if weights else ():
            fetch(commit, single, index)
            if (folder / single).is_file():
                break
            if (folder / index).is_file():
                fetch(commit, *shard_names(folder / index))
                break
    except ModelError:
        raise
    except Exception as error:  # those of the Hub's HTTP library, which depends on the version, are among them
        raise _unavailable(model, revision, error) from error
    return folder


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
        why = "not completely in the Hub's cache, and HF_HUB_OFFLINE is set; download it once without"
    elif isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
        why = "the Hub refuses access; check HF_TOKEN"
    else:
        why = f"not available from the Hub: {' '.join(str(cause).split()) or repr(cause)}"
    return ModelError(f"--model {model}{at}: {why}")
