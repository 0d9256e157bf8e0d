"""Every reason with which the server refuses or ends a request is documented where callers look for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt_grpc.errors import CONTEXT_LENGTH_EXCEEDED
from mpt_grpc.server.status import REASONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", ["protos/mpt/v1/text_generation.proto", "docs/clients.md"])
@pytest.mark.parametrize("reason", [*REASONS, CONTEXT_LENGTH_EXCEEDED])
def test_a_reason_is_documented(reason: str, file: str) -> None:
    assert reason in (ROOT / file).read_text(encoding="utf-8")
