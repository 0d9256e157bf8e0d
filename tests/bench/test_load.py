"""What a load plans, from its seed or from a trace."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from mpt_grpc.bench import load
from mpt_grpc.bench.load import Lengths, PlannedRequest
from mpt_grpc.errors import BenchmarkError

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,1000,3000
2023-11-16 18:15:48.6805900,1,7
"""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE, encoding="utf-8")
    return file


def test_lengths_are_uniform_and_the_same_for_the_same_seed() -> None:
    requests = load.random_lengths(4_000, Lengths(1, 4), Lengths(9, 9), Random(3))
    assert requests == load.random_lengths(4_000, Lengths(1, 4), Lengths(9, 9), Random(3))
    assert {request.num_output_tokens for request in requests} == {9}
    for length in range(1, 5):
        assert sum(request.num_prompt_tokens == length for request in requests) == pytest.approx(1_000, rel=0.1)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    requests = load.random_lengths(5_000, Lengths(1, 1), Lengths(1, 1), Random(0))
    arrivals = load.poisson(requests, 20, Random(1))
    assert arrivals == load.poisson(requests, 20, Random(1))
    times = [request.start_s for request in arrivals.requests]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps) > 0
    assert times[-1] == pytest.approx(5_000 / 20, rel=0.05)
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.1)


def test_a_trace_is_read_in_the_order_of_its_times(trace: Path) -> None:
    assert load.read_trace(trace, None) == (
        PlannedRequest(0, 374, 44),
        PlannedRequest(pytest.approx(2), 1, 7),
        PlannedRequest(pytest.approx(4), 1000, 3000),
    )
    assert len(load.read_trace(trace, 2)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("a,b\n1,2\n", "is not CSV with the columns TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,many,4\n", "is not CSV"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,3,4\n", "is not CSV"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,3\n", "is not CSV"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_not_a_trace_is_an_error(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "trace.csv"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(BenchmarkError, match=f"^--trace: .*{message}"):
        load.read_trace(file, None)


@pytest.mark.parametrize("max_context_tokens", [2, 3, 100, 2048, 4000, 100_000])
def test_one_factor_scales_every_length_into_the_context(trace: Path, max_context_tokens: int) -> None:
    requests = load.read_trace(trace, None)
    scaled = load.fit(requests, max_context_tokens)
    totals = [request.num_prompt_tokens + request.num_output_tokens for request in scaled]
    assert max(totals) <= max_context_tokens
    assert all(request.num_prompt_tokens and request.num_output_tokens for request in scaled)
    if max_context_tokens >= 4000:
        assert scaled == requests
    elif max_context_tokens >= 100:
        assert max(totals) >= max_context_tokens - 4
        assert scaled[2].num_output_tokens == pytest.approx(3 * scaled[2].num_prompt_tokens, abs=3)


def test_a_replay_has_the_times_of_its_trace_or_is_stretched_to_a_rate(trace: Path) -> None:
    requests = load.read_trace(trace, None)
    assert load.replay(requests, None).requests == requests
    stretched = load.replay(requests, 4)
    assert [request.start_s for request in stretched.requests] == pytest.approx([0, 0.25, 0.5])
    assert [request.start_s for request in load.replay(requests[:1], 4).requests] == [0]
