"""Downloads files of the Hugging Face Hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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


def file_names(model: str, commit: str) -> Sequence[str]:
    """Returns the names of the files in a repository of the Hub; none if the Hub does not respond."""
    try:
        return HfApi().list_repo_files(model, revision=commit)
    except Exception:  # also those of the Hub's HTTP library, which depends on its version
        return ()


def download(model: str, revision: str | None, *names: str) -> Path:
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
