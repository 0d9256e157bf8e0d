"""Constraints in the engine: a slow or failing one affects only its own request."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from conftest import generation, submit
from hypothesis import given, settings
from hypothesis import strategies as st
from json_schemas import conforms, schemas

from mpt_grpc.constraint import JsonSchema
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.stream import ThreadStream, collect
from mpt_grpc.errors import FieldViolation, InternalError, InvalidRequestError
from mpt_grpc.request import DecodingOptions, SamplingParameters
from mpt_grpc.results import FinishReason
from mpt_grpc.step import Matcher

ALLOWED = frozenset(range(300, 340))
SEEDED = SamplingParameters(seed=4)


class OnlySome:
    """A matcher that allows a few tokens. Its `masks` can be made to block or to fail."""

    def __init__(self, may_return: threading.Event | None = None, error: Exception | None = None) -> None:
        self.called = threading.Event()
        self._may_return, self._error = may_return, error

    def advance(self, token_id: int) -> bool:
        assert token_id in ALLOWED
        return False

    def masks(self, drafts: Sequence[int]) -> list[bytes]:
        self.called.set()
        if self._may_return is not None:
            assert self._may_return.wait(30)
        if self._error is not None:
            raise self._error
        return [sum(1 << token_id for token_id in ALLOWED).to_bytes(512, "little")] * (1 + len(drafts))


def constrained(engine: Engine, name: str, matcher: Matcher) -> ThreadStream:
    prepared = engine.preparation.prepare(generation(name, sampling=SEEDED))
    return engine.submit(replace(prepared, matchers=(matcher,)), ThreadStream)


def test_slow_mask_delays_only_its_own_request_and_does_not_change_its_tokens(shared_engine: Engine) -> None:
    expected = collect(constrained(shared_engine, "quick", OnlySome())).token_ids
    assert set(expected) <= ALLOWED
    may_return = threading.Event()
    matcher = OnlySome(may_return)
    stream = constrained(shared_engine, "slow", matcher)
    assert matcher.called.wait(30)
    others = [submit(shared_engine, generation(f"other {i}", max_new_tokens=30)) for i in range(3)]
    assert [len(collect(other).token_ids) for other in others] == [30] * 3
    may_return.set()
    assert collect(stream).token_ids == expected


def test_request_cancelled_while_its_mask_is_computed_is_cleaned_up(shared_engine: Engine) -> None:
    may_return = threading.Event()
    matcher = OnlySome(may_return)
    stream = constrained(shared_engine, "left", matcher)
    assert matcher.called.wait(30)
    other = submit(shared_engine, generation("other", max_new_tokens=30))
    stream.cancel()
    assert collect(stream).token_ids == ()
    assert len(collect(other).token_ids) == 30
    may_return.set()
    shared_engine.generate(generation("next"))
    assert shared_engine.num_in_flight == 0
    assert shared_engine.load.num_free_blocks == 512


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequestError(FieldViolation("decoding.regex", "too costly")), InvalidRequestError),
        (RuntimeError("a fault"), InternalError),
    ],
)
def test_failing_mask_ends_only_its_own_request(
    error: Exception, expected: type[Exception], shared_engine: Engine
) -> None:
    other = submit(shared_engine, generation("other", max_new_tokens=30))
    bad = constrained(shared_engine, "bad", OnlySome(error=error))
    with pytest.raises(expected):
        collect(bad)
    assert len(collect(other).token_ids) == 30
    assert shared_engine.num_in_flight == 0


def test_finished_outputs_conform_to_their_json_schema(shared_engine: Engine) -> None:
    num_finished = 0

    @settings(max_examples=25, derandomize=True)
    @given(st.lists(schemas, min_size=4, max_size=4), st.floats(0, 2), st.integers(0, 1 << 32))
    def check(batch: list[dict[str, Any]], temperature: float, seed: int) -> None:
        nonlocal num_finished
        streams = [
            submit(
                shared_engine,
                generation(
                    f"r{number}",
                    max_new_tokens=120,
                    ignore_eos=False,
                    sampling=SamplingParameters(temperature=temperature, seed=seed),
                    decoding=DecodingOptions(constraint=JsonSchema(json.dumps(schema))),
                ),
            )
            for number, schema in enumerate(batch)
        ]
        for stream, schema in zip(streams, batch, strict=True):
            output = collect(stream)
            if output.finish.reason is FinishReason.EOS_TOKEN:
                num_finished += 1
                assert conforms(json.loads(output.text), schema), output.text
            else:
                assert (output.finish.reason, len(output.token_ids)) == (FinishReason.MAX_NEW_TOKENS, 120)

    check()
    assert num_finished > 30
