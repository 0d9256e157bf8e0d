"""The checks of `mpt-grpc verify`, from the files to the log probabilities that the engine serves."""

from __future__ import annotations

from collections.abc import Iterator

from mpt_grpc.checkpoint import download_weights, find_checkpoint
from mpt_grpc.errors import InternalError, ModelError
from mpt_grpc.settings import ModelSettings
from mpt_grpc.verification.check import Check
from mpt_grpc.verification.model_checks import model_checks
from mpt_grpc.verification.text_checks import text_checks


def checks(wanted: ModelSettings) -> Iterator[Check]:
    """Yields the results of the checks in turn; if the checkpoint cannot be served, there is only one.

    Requires transformers. Raises ModelError if there is no such checkpoint, SettingsError for an invalid setting.
    """
    checkpoint = find_checkpoint(wanted.model, revision=wanted.revision)
    try:
        yield from text_checks(wanted, checkpoint)
        download_weights(checkpoint)  # now, so that the engine and the references read the same commit
        yield from model_checks(wanted, checkpoint)
    except ModelError as error:
        yield Check("checkpoint", "FAILED", str(error))
    except InternalError as error:
        yield Check("checkpoint", "FAILED", str(error.__cause__ or error))
