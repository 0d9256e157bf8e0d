"""Speculation changes the number of steps and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import generation, submit

from mpt_grpc.constraint import JsonSchema, Regex
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.stream import collect
from mpt_grpc.request import (
    DecodingOptions,
    GenerationRequest,
    LogprobOptions,
    RepetitionGuard,
    SamplingParameters,
    StoppingCriteria,
)

TEXT = "The cat sat on the mat. The dog sat on the mat. The cat sat on the mat. The dog sat on"
DECODING = {
    "plain": DecodingOptions(),
    "penalties": DecodingOptions(repetition_penalty=1.1, frequency_penalty=0.1, presence_penalty=0.1),
    "bias": DecodingOptions(logit_bias={300: 2.0, 301: -2.0}),
    "regex": DecodingOptions(constraint=Regex(r"( the (cat|dog|mat)\.?)*")),
    "schema": DecodingOptions(
        constraint=JsonSchema('{"type": "array", "items": {"const": "again"}, "minItems": 6, "maxItems": 6}')
    ),
}


def request(name: str, seed: int) -> GenerationRequest:
    return replace(
        generation(f"{name} {seed}", TEXT),
        sampling=SamplingParameters(temperature=(0.0, 0.3, 1.0)[seed % 3], seed=seed, num_sequences=1 + seed // 3),
        decoding=DECODING[name],
        stopping=StoppingCriteria(
            max_new_tokens=48, min_new_tokens=20, repetition_guard=RepetitionGuard(3, 4) if seed == 3 else None
        ),
        logprobs=LogprobOptions(output=True, num_top=2),
    )


def test_all_sampling_options_give_the_same_tokens_in_fewer_steps(
    make_engine: Callable[..., Engine], shared_engine: Engine
) -> None:
    speculating = make_engine(speculate="ngram")
    requests = [request(name, seed) for name in DECODING for seed in range(4)]
    expected = [shared_engine.generate(one) for one in requests]
    outputs = [collect(stream) for stream in [submit(speculating, one) for one in requests]]
    for one, output, wanted in zip(requests, outputs, expected, strict=True):
        assert output.outputs == wanted.outputs, one.request_id
    num_tokens = sum(len(one.token_ids) for whole in expected for one in whole.outputs)
    assert speculating.load.num_generated_tokens == num_tokens


@pytest.mark.parametrize("decoding", ["plain", "schema"])
def test_a_text_that_repeats_its_prompt_takes_fewer_steps(make_engine: Callable[..., Engine], decoding: str) -> None:
    engine = make_engine(speculate="ngram")
    num_tokens = 0
    for number in range(100):  # whether drafts are checked depends on the times of the last steps
        num_tokens += len(engine.generate(replace(request(decoding, 0), request_id=f"{number}")).token_ids)
        if engine.load.num_accepted_tokens > num_tokens / 10:
            break
    load = engine.load
    assert load.num_steps < num_tokens
    assert load.num_draft_tokens >= load.num_accepted_tokens > 0
    assert load.num_steps + load.num_accepted_tokens >= num_tokens


def test_right_drafts_after_the_end_of_an_output_are_not_counted(make_engine: Callable[..., Engine]) -> None:
    """Each step of a request that runs alone gives a token, and one for each draft that is accepted."""
    engine = make_engine(speculate="ngram")
    for number in range(8):
        guard = RepetitionGuard(2 + number, 64)
        stopping = StoppingCriteria(max_new_tokens=300, repetition_guard=guard, ignore_eos=True)
        engine.generate(replace(request("plain", 0), request_id=f"{number}", stopping=stopping))
    load = engine.load
    assert load.num_accepted_tokens > 0
    assert load.num_steps + load.num_accepted_tokens == load.num_generated_tokens
