"""`mpt-grpc verify`: checks that a checkpoint is served correctly."""

from __future__ import annotations

import argparse
import importlib.util
import warnings

from mpt_grpc.commands import logs, model_options
from mpt_grpc.errors import VerificationError


def run(parsed: argparse.Namespace) -> None:
    """Prints a line for each check.

    Raises VerificationError if a check fails or a library is missing, ModelError if there is no such checkpoint, and
    SettingsError for an invalid flag.
    """
    logs.configure("critical")  # what fails is printed as the result of a check
    for library, extra in (("torch", "torch"), ("transformers", "verify")):
        if importlib.util.find_spec(library) is None:
            raise VerificationError(f"verify requires {library}; install the extra {extra!r} (see docs/install.md)")
    # Imported here, since they import torch, which takes seconds.
    from transformers.utils import logging

    from mpt_grpc.verification.checks import checks

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", module=r"(transformers|peft)\.")
    failed = []
    for check in checks(model_options.model_settings(parsed)):
        print(f"{check.name:<17}  {check.verdict:<7}  {check.detail}", flush=True)
        if not check.passed:
            failed.append(check.name)
    if failed:
        raise VerificationError(f"the checkpoint fails: {', '.join(failed)}")
