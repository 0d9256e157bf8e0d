"""docs/openai.md says of every field what the gateway does with it."""

from __future__ import annotations

import re
from pathlib import Path

from mpt_grpc.gateway.body import HARMLESS, REFUSED
from mpt_grpc.gateway.requests import ChatCompletionRequest, CompletionRequest

PAGE = (Path(__file__).parents[2] / "docs/openai.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (both|chat|text) \| (\w+) \|", PAGE, re.MULTILINE)


def rows(*, of: str = "both|chat|text", says: str) -> set[str]:
    return {name for name, kind, verdict in ROWS if re.fullmatch(of, kind) and re.fullmatch(says, verdict)}


def test_no_field_has_two_rows() -> None:
    assert len({name for name, _, _ in ROWS}) == len(ROWS)


def test_the_fields_that_are_served_are_those_of_the_two_endpoints() -> None:
    assert rows(of="both|chat", says="supported|differs") == set(ChatCompletionRequest.model_fields)
    assert rows(of="both|text", says="supported|differs") == set(CompletionRequest.model_fields)


def test_the_fields_that_are_ignored_and_refused_are_those() -> None:
    assert rows(says="ignored") == set(HARMLESS)
    assert rows(says="refused") == set(REFUSED)
