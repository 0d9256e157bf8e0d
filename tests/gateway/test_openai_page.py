"""docs/openai.md lists every field of a request and how the gateway handles it."""

from __future__ import annotations

import re
from pathlib import Path

from mpt_grpc.gateway.parsing import IGNORED, REFUSED
from mpt_grpc.gateway.requests import ChatCompletionRequest, CompletionRequest

PAGE = (Path(__file__).parents[2] / "docs/openai.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (both|chat|text) \| (\w+) \|", PAGE, re.MULTILINE)


def fields(*, of: str = "both|chat|text", support: str) -> set[str]:
    return {name for name, kind, level in ROWS if re.fullmatch(of, kind) and re.fullmatch(support, level)}


def test_no_field_is_listed_twice() -> None:
    assert len({name for name, _, _ in ROWS}) == len(ROWS)


def test_supported_fields_are_those_of_the_two_endpoints() -> None:
    assert fields(of="both|chat", support="supported|differs") == set(ChatCompletionRequest.model_fields)
    assert fields(of="both|text", support="supported|differs") == set(CompletionRequest.model_fields)


def test_ignored_and_refused_fields_are_those_of_the_parser() -> None:
    assert fields(support="ignored") == set(IGNORED)
    assert fields(support="refused") == set(REFUSED)
