"""The Triton kernels compute what the torch backend computes. They run without a GPU, in Triton's interpreter."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from model import triton_checks as checks

pytest.importorskip("triton", reason="needs Triton, which is built for Linux")

Run = Callable[..., None]
GQA, MQA = {"attn_type": "grouped_query_attention"}, {"attn_type": "multiquery_attention"}
SMALL = {"d_model": 32, "n_heads": 2}
SPANS = [(0, 1), (5, 1), (255, 1), (256, 1), (600, 1), (40, 7), (0, 70), (513, 20), (250, 9)]
"""Context and new tokens of each sequence: across the ends of blocks, splits and tiles, and drafts."""


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """Runs a check in a process of its own: Triton decides when it is imported whether it interprets."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=checks.interpret) as process:
        yield lambda check, *arguments: process.submit(check, *arguments).result()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("attn_config", "fields", "dtype", "cache_dtype"),
    [
        pytest.param({}, SMALL, torch.float32, torch.float32, id="float32"),
        pytest.param({"alibi_bias_max": 16}, SMALL, torch.float16, torch.float16, id="float16"),
        pytest.param({}, SMALL, torch.float16, torch.bfloat16, id="bfloat16"),
        pytest.param({}, SMALL, torch.float16, torch.int8, id="int8"),
        pytest.param({**GQA, "kv_n_heads": 2}, {"d_model": 384, "n_heads": 6}, torch.float16, torch.float16, id="gqa"),
        pytest.param(MQA, {"n_heads": 24, "d_model": 384}, torch.float16, torch.float16, id="mqa-24-heads"),
        pytest.param({}, {"d_model": 224, "n_heads": 2}, torch.float16, torch.int8, id="int8-head-size-112"),
        pytest.param({"sliding_window_size": 37}, SMALL, torch.float16, torch.float16, id="sliding-window"),
        pytest.param({"alibi": False}, {"d_model": 128, "n_heads": 1}, torch.float16, torch.float16, id="no-alibi"),
    ],
)
def test_attention_matches_the_torch_backend(
    interpreted: Run,
    attn_config: dict[str, Any],
    fields: dict[str, Any],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    seed: int,
) -> None:
    interpreted(checks.check_reference, attn_config, fields, SPANS[seed::2], dtype, cache_dtype, seed)


def test_a_context_of_5000_tokens_is_split_and_merged(interpreted: Run) -> None:
    interpreted(checks.check_reference, {"alibi_bias_max": 16}, SMALL, [(5000, 1)], torch.float16, torch.float16, 0)


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(interpreted: Run) -> None:
    interpreted(checks.check_batch_invariance, [(3, 1), (700, 1), (30, 5), (20, 70)])


@pytest.mark.parametrize("attn_config", [{}, {"sliding_window_size": 25}])
def test_a_token_has_the_same_bits_in_any_chunk(interpreted: Run, attn_config: dict[str, Any]) -> None:
    interpreted(checks.check_equal_bits_in_chunks, attn_config, 50, [1, 20, 37])


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8])
def test_non_finite_values_do_not_spread(interpreted: Run, cache_dtype: torch.dtype) -> None:
    interpreted(checks.check_non_finite_values, cache_dtype)


@pytest.mark.parametrize(
    ("attn_config", "fields", "records"),
    [
        pytest.param({}, SMALL, True, id="plain-recorded"),
        pytest.param({**GQA, "kv_n_heads": 2, "qk_ln": True}, {"no_bias": False}, False, id="gqa-qk_ln"),
        pytest.param({"rope": True, "sliding_window_size": 7}, SMALL, False, id="rope-sliding-window"),
    ],
)
def test_a_model_has_the_logits_of_the_torch_backend(
    interpreted: Run, attn_config: dict[str, Any], fields: dict[str, Any], records: bool
) -> None:
    interpreted(partial(checks.check_model, records=records), attn_config, fields)


@pytest.mark.parametrize(("num_rows", "sizes"), [(1, (70, 50)), (16, (300, 33)), (17, (64, 32)), (150, (130, 257))])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_product_is_that_of_its_matrix(
    interpreted: Run, num_rows: int, sizes: tuple[int, int], is_int8: bool, batch_invariant: bool
) -> None:
    interpreted(partial(checks.check_product, is_int8=is_int8, batch_invariant=batch_invariant), num_rows, sizes)
