"""docs/openai.md lists every field of a request and how the gateway handles it."""

from __future__ import annotations

import re
from pathlib import Path

from mpt_grpc.gateway import endpoints, middleware, parsing, protocol, reading, serve, strict
from mpt_grpc.gateway.field_rules import COMPLETION_RULES, RESPONSE_RULES
from mpt_grpc.gateway.requests import ChatCompletionRequest, CompletionRequest
from mpt_grpc.gateway.response_request import ResponseRequest
from mpt_grpc.limits import MAX_LOGPROBS

PAGE = (Path(__file__).parents[2] / "docs/openai.md").read_text(encoding="utf-8")
GROUPS = {"all": ("chat", "text", "responses"), "both": ("chat", "text"), "chat, responses": ("chat", "responses")}
ROWS = [
    (name, endpoint, support)
    for name, group, support in re.findall(
        r"^\| `(\w+)` \| (all|both|chat|text|responses|chat, responses) \| (\w+) \|", PAGE, re.MULTILINE
    )
    for endpoint in GROUPS.get(group, (group,))
]


def fields(endpoint: str, *support: str) -> set[str]:
    return {name for name, of, level in ROWS if of == endpoint and level in support}


def test_no_field_is_listed_twice() -> None:
    assert len({(name, endpoint) for name, endpoint, _ in ROWS}) == len(ROWS)


def test_supported_fields_are_those_of_the_endpoints() -> None:
    assert fields("chat", "supported", "differs") == set(ChatCompletionRequest.model_fields)
    assert fields("text", "supported", "differs") == set(CompletionRequest.model_fields)
    assert fields("responses", "supported", "differs") == set(ResponseRequest.model_fields)


def test_ignored_and_refused_fields_are_those_of_the_rules() -> None:
    for endpoint, rules in (("chat", COMPLETION_RULES), ("text", COMPLETION_RULES), ("responses", RESPONSE_RULES)):
        assert fields(endpoint, "ignored") == set(rules.ignored)
        assert fields(endpoint, "refused") == set(rules.refused)


def test_the_documented_limits_are_those_of_the_code() -> None:
    limits = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| (?:4\d\d)? ?\|$", PAGE, re.MULTILINE))
    assert limits == {
        "outputs of a text completion, prompts times `n`": (
            f"{endpoints.MAX_OUTPUTS}, or fewer if the server's queue and batch hold fewer"
        ),
        "items of a field, other than token IDs": f"{strict.MAX_ITEMS:,}",
        "values in a body, token IDs included": f"{parsing.MAX_VALUES:,}",
        "names of fields in a body, those of all objects together": f"{parsing.MAX_NAMES:,}",
        "log probabilities of a response, alternatives included": f"{MAX_LOGPROBS:,}",
        "nesting of a body": f"{parsing.MAX_DEPTH} levels",
        "size of a body": f"{reading.MAX_BODY_BYTES >> 20} MiB",
        "time for a body": f"{reading.BODY_TIMEOUT_S} seconds, and {reading.STALL_TIMEOUT_S} seconds between its parts",
        "headers": f"{middleware.MAX_HEADERS}, and {protocol.MAX_HEAD_BYTES >> 10} KiB together",
        "time for headers": f"{protocol.HEAD_TIMEOUT_S} seconds, then the connection is closed",
        "idle connection": f"{serve.KEEP_ALIVE_TIMEOUT_S} seconds, then the connection is closed",
    }
