"""Snapshots of the engine's state."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
from conftest import SteppedRunner, generation, submit

from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.inquiries import StateInquiries
from mpt_grpc.engine.stream import collect
from mpt_grpc.errors import DrainingError, InvalidRequestError, UnavailableError
from mpt_grpc.request import GenerationRequest, SamplingParameters
from mpt_grpc.results import FinishReason

PROMPT = tuple(range(1, 41))
"""Fills two and a half blocks."""


def test_state_lists_running_and_waiting_requests_with_their_blocks(
    make_engine: Callable[..., Engine], stepped: list[SteppedRunner]
) -> None:
    engine = make_engine(max_running_requests=2)
    streams = [submit(engine, generation("first", PROMPT))]
    stepped[0].wait_for_step()
    streams += [submit(engine, generation(name, PROMPT)) for name in ("second", "third")]
    stepped[0].allow()
    stepped[0].wait_for_step()
    future = engine.state()
    assert not future.done(), "the state is only taken between two steps"
    stepped[0].allow()
    state = future.result(30)
    first, second, third = state.in_flight
    assert [request.request_id for request in state.in_flight] == ["first", "second", "third"]
    assert (state.load.num_running, state.load.num_waiting) == (2, 1)
    assert (first.stats.num_output_tokens, second.stats.num_output_tokens, third.stats.num_output_tokens) == (2, 1, 0)
    assert first.sequences[0].num_computed_tokens == 41
    assert len(first.sequences[0].blocks) == 3
    assert second.sequences[0].blocks[:2] == first.sequences[0].blocks[:2], "the prompt's full blocks are shared"
    assert second.stats.num_cached_tokens == 32
    assert third.sequences[0].blocks == ()
    assert third.stats.scheduled_time_s is None
    assert state.ended == state.cached_blocks == ()
    stepped[0].run_free()
    for stream in streams:
        collect(stream)


def test_state_lists_recently_ended_requests_and_cached_blocks(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    blocks_before = engine.load.num_free_blocks
    for number in range(70):
        engine.generate(
            generation(f"r{number}", PROMPT, max_new_tokens=2, sampling=SamplingParameters(seed=1, num_sequences=2))
        )
    state = engine.state().result(30)
    assert [request.request_id for request in state.ended] == [f"r{number}" for number in range(6, 70)]
    last = state.ended[-1]
    assert [sequence.finish_reason for sequence in last.sequences] == [FinishReason.MAX_NEW_TOKENS] * 2
    assert last.stats.num_output_tokens == 4
    assert last.stats.arrival_time_s <= (last.stats.first_token_time_s or 0) <= last.stats.end_time_s <= state.time_s
    assert state.in_flight == ()
    assert len(state.cached_blocks) == 2
    assert state.load.num_free_blocks == blocks_before


def test_state_counts_the_preparing_requests_that_it_lists(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    interval_s, has_ended = sys.getswitchinterval(), threading.Event()

    def send() -> None:
        while not has_ended.is_set():
            with suppress(InvalidRequestError):  # so many tokens are prepared in another thread, and do not fit
                engine.generate(GenerationRequest("refused", (5,) * 5000))

    sending = threading.Thread(target=send)
    sys.setswitchinterval(1e-6)
    try:
        sending.start()
        for _ in range(500):
            state = engine.state().result(30)
            assert state.load.num_preparing == sum(not request.sequences for request in state.in_flight)
    finally:
        has_ended.set()
        sending.join()
        sys.setswitchinterval(interval_s)


def test_stopped_engine_does_not_return_its_state(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.refuse(DrainingError("the server is draining"))
    engine.state().result(30)
    engine.close()
    with pytest.raises(UnavailableError, match="draining"):
        engine.state()


def test_those_who_have_asked_for_a_state_that_cannot_be_taken_are_told_so() -> None:
    inquiries = StateInquiries()
    future = inquiries.ask()
    with pytest.raises(ZeroDivisionError):
        inquiries.answer(lambda: 1 // 0)
    inquiries.refuse(DrainingError("the server is draining"))
    with pytest.raises(UnavailableError, match="draining"):
        future.result(30)
