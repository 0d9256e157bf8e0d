"""The proto's comments and docs/generation.md state the limits of the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mpt_grpc.limits import (
    MAX_BYTES,
    MAX_CANCELLED,
    MAX_COUNTS,
    MAX_LOGPROBS,
    MAX_RETURNED_TOKENS,
    MAX_TEXT_CHARACTERS,
    MAX_TOKEN_IDS,
    MAX_TOKENIZED_CHARACTERS,
    RANGES,
    Range,
)

ROOT = Path(__file__).parents[1]
PROTO = (ROOT / "protos/mpt/v1/text_generation.proto").read_text(encoding="utf-8")
PAGE = (ROOT / "docs/generation.md").read_text(encoding="utf-8")
DESCRIBED_ELSEWHERE = {"decoding.choice.options", "model"}
"""Fields without a limit in words of their own: of choices together that of constraints, and the names of models."""


def comment(field: str) -> str:
    """Returns the comment of a field in the proto, in one line; of a constraint, that of all of them."""
    name = {"json_schema": "constraint", "regex": "constraint", "lark_grammar": "constraint"}.get(
        field.rpartition(".")[2], field.rpartition(".")[2]
    )
    declaration = re.search(rf"((?:  //.*\n)+)  (?:oneof {name} \{{|[^/\n]*\b{name} = \d+)", PROTO)
    assert declaration, name
    return " ".join(line.strip(" /") for line in declaration[1].splitlines())


def option(field: str) -> str:
    """Returns the row of an option in docs/generation.md."""
    name = field.rpartition(".")[2]
    row = re.search(rf"^\| `(?:{name}|RepetitionGuard\([^`]*{name})\b.*$", PAGE, re.MULTILINE)
    assert row, name
    return row[0]


def words(numbers: Range) -> str:
    return f"above {numbers.low}, up to {numbers.high}" if numbers.excludes_low else f"{numbers.low} to {numbers.high}"


@pytest.mark.parametrize("field", RANGES)
def test_ranges_are_documented(field: str) -> None:
    assert words(RANGES[field]) in comment(field)
    if "repetition_guard" not in field:
        assert words(RANGES[field]) in option(field)


@pytest.mark.parametrize("field", sorted(MAX_COUNTS))
def test_counts_are_documented(field: str) -> None:
    assert re.search(rf"(at most|up to|1 to) {MAX_COUNTS[field]}\b", comment(field).replace(",", ""), re.IGNORECASE)


@pytest.mark.parametrize("field", sorted(MAX_BYTES.keys() - DESCRIBED_ELSEWHERE))
def test_sizes_are_documented(field: str) -> None:
    size = MAX_BYTES[field]
    assert re.search(rf"{size:,} bytes|{size >> 10} KiB", comment(field))


def test_all_constraints_have_the_same_size_at_most() -> None:
    fields = ("json_schema", "lark_grammar", "regex", "choice.options")
    assert {MAX_BYTES[f"decoding.{field}"] for field in fields} == {65_536}


def test_the_limits_of_other_calls_are_documented() -> None:
    assert f"up to {MAX_TEXT_CHARACTERS:,} characters or token IDs" in comment("truncate_prompt_tokens")
    limits = f"at most {MAX_TOKENIZED_CHARACTERS:,} characters and {MAX_RETURNED_TOKENS:,} tokens."
    assert f"The text, {limits}" in PROTO
    assert f"The token IDs, at most {MAX_TOKEN_IDS:,}, each" in PROTO
    assert f"may be more than {MAX_LOGPROBS:,} is refused" in comment("output_options.top_logprobs")
    assert f"The IDs of the requests, at most {MAX_CANCELLED}." in PROTO


@pytest.mark.parametrize(
    ("numbers", "inside", "outside", "text"),
    [
        (Range(0, 2), (0, 1.5, 2), (-0.1, 2.1), "[0, 2]"),
        (Range(0, 2, excludes_low=True, hint="1 is usual"), (0.1, 2), (0, -1, 3), "(0, 2]; 1 is usual"),
    ],
)
def test_a_range_includes_its_ends_unless_the_lower_one_is_excluded(
    numbers: Range, inside: tuple[float, ...], outside: tuple[float, ...], text: str
) -> None:
    assert all(number in numbers for number in inside)
    assert not any(number in numbers for number in (*outside, float("nan")))
    assert str(numbers) == text
