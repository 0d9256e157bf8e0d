"""The engine as a library: outputs of requests that run alone, concurrently, with scarce memory, and after failures."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SteppedRunner, UseRunner, demo_settings, generation, submit
from torch import Tensor

from mpt_grpc.constraint import JsonObject
from mpt_grpc.engine import load
from mpt_grpc.engine.assembly import PlainOutput
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.stream import AsyncStream, collect
from mpt_grpc.errors import (
    DeviceLostError,
    DuplicateRequestError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from mpt_grpc.model import sampler
from mpt_grpc.model.runner import Runner, StepOutput
from mpt_grpc.model.transfer import Receipt
from mpt_grpc.request import (
    CacheOptions,
    ChunkOptions,
    DecodingOptions,
    GenerationRequest,
    LogprobOptions,
    PartialOutput,
    RepetitionGuard,
    SamplingParameters,
    StoppingCriteria,
)
from mpt_grpc.results import Finish, FinishReason, Generation, TokenEvent
from mpt_grpc.step import StepPlan
from mpt_grpc.text.detokenizer import TextAssembler

SEEDED = SamplingParameters(temperature=0.9, top_p=0.95, top_k=200, min_p=0.01, seed=1234)
PROMPTS = [
    "Once upon a time",
    "The old rabbit said to his wife, ",
    "A king had three daughters. The eldest",
    "Down by the river " * 8,
    "Peter",
    "It was a dark night, and the wind blew through the trees. " * 3,
    "“Where are you going?” asked the",
    "The fox",
]


def run_concurrently(engine: Engine, requests: list[GenerationRequest]) -> dict[str, Generation]:
    """Runs the requests at the same time and returns their outputs by request ID."""
    streams = [submit(engine, request) for request in requests]
    return {stream.request_id: collect(stream) for stream in streams}


def mixed_requests(n: int) -> list[GenerationRequest]:
    return [
        generation(
            f"r{i}",
            PROMPTS[i % len(PROMPTS)] + " and" * (i // len(PROMPTS)),
            max_new_tokens=16 + 5 * (i % 7),
            sampling=SamplingParameters(temperature=0.8, top_k=50 * (i % 3), min_p=0.02 * (i % 2), seed=i)
            if i % 3
            else None,
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def alone(shared_engine: Engine) -> dict[str, Generation]:
    """The outputs of 16 requests, each run with no other request in flight."""
    return {r.request_id: shared_engine.generate(r) for r in mixed_requests(16)}


def assert_same_tokens(outputs: dict[str, Generation], expected: dict[str, Generation]) -> None:
    assert {i: o.token_ids for i, o in outputs.items()} == {i: o.token_ids for i, o in expected.items()}
    assert {i: o.text for i, o in outputs.items()} == {i: o.text for i, o in expected.items()}


def test_concurrent_requests_have_the_same_outputs_as_when_run_alone(
    shared_engine: Engine, alone: dict[str, Generation]
) -> None:
    assert_same_tokens(run_concurrently(shared_engine, mixed_requests(16)), alone)


def test_prompts_in_parts_beside_running_outputs_do_not_change_outputs(
    make_engine: Callable[..., Engine], alone: dict[str, Generation]
) -> None:
    engine = make_engine(prefill_slowdown=1.2)
    assert_same_tokens(run_concurrently(engine, mixed_requests(len(alone))), alone)


def test_preemption_does_not_change_outputs(make_engine: Callable[..., Engine], alone: dict[str, Generation]) -> None:
    engine = make_engine(num_blocks=24)
    outputs = run_concurrently(engine, mixed_requests(16))
    assert_same_tokens(outputs, alone)
    assert sum(output.stats.num_preemptions for output in outputs.values()) > 0
    assert engine.load.num_free_blocks == 24


def test_chunked_prefill_does_not_change_outputs(
    make_engine: Callable[..., Engine], alone: dict[str, Generation]
) -> None:
    engine = make_engine(max_step_tokens=7, max_running_requests=5)
    assert_same_tokens(run_concurrently(engine, mixed_requests(16)), alone)


def test_streamed_deltas_add_up_to_the_complete_output(shared_engine: Engine) -> None:
    request = generation(sampling=SEEDED, max_new_tokens=40)
    deltas = list(shared_engine.stream(request))
    assert len(deltas) > 10
    assert collect(deltas).text == shared_engine.generate(request).text
    assert [delta.finish is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]


def test_repeated_prompt_is_taken_from_the_prefix_cache(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    prompt = tuple(range(1, 101))
    first = engine.generate(generation("a", prompt))
    again = engine.generate(generation("b", prompt))
    assert first.stats.num_cached_tokens == 0
    assert again.stats.num_cached_tokens == 96
    assert again.token_ids == first.token_ids
    for options in (CacheOptions(salt="another tenant"), CacheOptions(bypass=True)):
        other = engine.generate(generation("c", prompt, cache=options))
        assert other.stats.num_cached_tokens == 0
        assert other.token_ids == first.token_ids


def test_reported_random_seed_reproduces_the_output(shared_engine: Engine) -> None:
    unseeded = shared_engine.generate(generation(sampling=SamplingParameters()))
    assert unseeded.stats.seed != shared_engine.generate(generation(sampling=SamplingParameters())).stats.seed
    again = shared_engine.generate(generation(sampling=SamplingParameters(seed=unseeded.stats.seed)))
    assert again.token_ids == unseeded.token_ids


def test_text_ends_before_a_stop_string(shared_engine: Engine) -> None:
    whole = shared_engine.generate(generation(max_new_tokens=40)).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 5]
    output = shared_engine.generate(generation(max_new_tokens=40, stop=("never to be seen", stop)))
    assert output.text == whole[: whole.index(stop)]
    assert output.finish.reason is FinishReason.STOP_STRING
    assert output.finish.stop_string == stop
    assert len(output.token_ids) < 40


def test_stop_string_completed_only_by_the_final_flush_is_reported(shared_engine: Engine) -> None:
    """The only token is the first byte of a longer character, which becomes U+FFFD at the end of the output."""
    lead_byte = next(i for i in range(4096) if shared_engine.preparation.tokenizer.token_bytes(i) == b"\xe2")
    event = TokenEvent(0, lead_byte, finish=Finish(FinishReason.MAX_NEW_TOKENS))
    text = TextAssembler(shared_engine.preparation.tokenizer.detokenizer(), ["\ufffd"])
    output = PlainOutput(0, text, lambda _: None)
    output.feed(event)
    delta = output.take()
    assert delta is not None
    assert delta.text == ""
    assert delta.finish == Finish(FinishReason.STOP_STRING, stop_string="\ufffd")


def test_eos_token_ends_the_output_without_adding_text(shared_engine: Engine) -> None:
    (eos_token_id,) = shared_engine.preparation.tokenizer.eos_token_ids
    outputs = (
        shared_engine.generate(
            generation(
                prompt="And they lived happily ever after.\n",
                max_new_tokens=1500,
                ignore_eos=False,
                sampling=SamplingParameters(seed=seed),
            )
        )
        for seed in range(20)
    )
    output = next(o for o in outputs if o.finish.reason is FinishReason.EOS_TOKEN)
    assert output.token_ids[-1] == eos_token_id
    assert output.finish.stop_token_id == eos_token_id
    assert output.text == shared_engine.preparation.tokenizer.decode(output.token_ids[:-1])


def test_default_max_new_tokens_is_limited_by_the_context(shared_engine: Engine) -> None:
    context = shared_engine.preparation.limits.max_context_tokens
    output = shared_engine.generate(generation(prompt=(7,) * (context - 5), max_new_tokens=None))
    assert len(output.token_ids) == 5
    assert output.finish.reason is FinishReason.CONTEXT_LENGTH


def test_all_invalid_fields_are_reported_at_once(shared_engine: Engine) -> None:
    request = GenerationRequest(
        "x" * 200,
        (1, 999_999),
        SamplingParameters(
            temperature=float("nan"), top_k=-1, top_p=0.0, min_p=2.0, typical_p=0.0, seed=-1, num_sequences=17
        ),
        decoding=DecodingOptions(
            repetition_penalty=0.0,
            frequency_penalty=2.5,
            presence_penalty=float("nan"),
            logit_bias={-1: 0.0, 5: 101.0},
            allowed_token_ids=(3, 4096),
            constraint=JsonObject(),
        ),
        stopping=StoppingCriteria(
            max_new_tokens=-1,
            min_new_tokens=-1,
            stop_strings=("", "s" * 300),
            stop_token_ids=(-1,),
            ignore_eos=True,
            time_limit_s=0.0,
            repetition_guard=RepetitionGuard(min_repeats=1, max_cycle_tokens=257),
        ),
        logprobs=LogprobOptions(num_top=21),
        chunks=ChunkOptions(0, 0.0),
        cache=CacheOptions(salt="s" * 200),
        priority=101,
        truncate_prompt_tokens=0,
        resume_token_ids=(4096,),
    )
    with pytest.raises(InvalidRequestError) as caught:
        shared_engine.generate(request)
    assert {violation.field for violation in caught.value.violations} == {
        "request_id",
        "token_ids.ids[1]",
        "sampling.temperature",
        "sampling.top_k",
        "sampling.top_p",
        "sampling.min_p",
        "sampling.typical_p",
        "sampling.seed",
        "sampling.num_sequences",
        "decoding.repetition_penalty",
        "decoding.frequency_penalty",
        "decoding.presence_penalty",
        "decoding.logit_bias[-1]",
        "decoding.logit_bias[5]",
        "decoding.allowed_token_ids",
        "decoding.allowed_token_ids[1]",
        "stopping.max_new_tokens",
        "stopping.min_new_tokens",
        "stopping.stop_strings[0]",
        "stopping.stop_strings[1]",
        "stopping.stop_token_ids[0]",
        "stopping.ignore_eos",
        "stopping.time_limit",
        "stopping.repetition_guard.min_repeats",
        "stopping.repetition_guard.max_cycle_tokens",
        "output_options.top_logprobs",
        "output_options.chunk_tokens",
        "output_options.chunk_interval",
        "cache.salt",
        "priority",
        "truncate_prompt_tokens",
        "resume_token_ids",
        "resume_token_ids[0]",
    }


def test_request_larger_than_the_cache_is_rejected_and_the_next_one_served(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(num_blocks=4)
    with pytest.raises(InvalidRequestError, match=r"stopping.max_new_tokens: 60 .* context of 64: request at most 54"):
        engine.generate(generation(prompt=(5,) * 10, max_new_tokens=60))
    assert len(engine.generate(generation(prompt=(5,) * 10, max_new_tokens=54)).token_ids) == 54


def test_full_queue_rejects_further_requests(make_engine: Callable[..., Engine], stepped: list[SteppedRunner]) -> None:
    engine = make_engine(max_running_requests=1, max_waiting_requests=1)
    streams = [submit(engine, generation(name)) for name in ("a", "b")]
    with pytest.raises(OverloadedError):
        submit(engine, generation("c"))
    engine.cancel("b")
    stepped[0].run_free()
    assert collect(streams[1]).finish.reason is FinishReason.CANCELLED
    assert len(collect(streams[0]).token_ids) == 24


def test_duplicate_request_id_is_rejected_while_in_flight(
    make_engine: Callable[..., Engine], stepped: list[SteppedRunner]
) -> None:
    engine = make_engine()
    stream = submit(engine, generation("a"))
    with pytest.raises(DuplicateRequestError):
        submit(engine, generation("a"))
    stepped[0].run_free()
    assert len(collect(stream).token_ids) == 24
    assert len(engine.generate(generation("a")).token_ids) == 24


@pytest.mark.parametrize("state", ["waiting", "mid-prefill", "running"])
def test_aborted_request_frees_its_blocks_within_one_step(
    state: str, make_engine: Callable[..., Engine], stepped: list[SteppedRunner]
) -> None:
    engine = make_engine(num_blocks=64, max_running_requests=2, max_step_tokens=32)
    runner = stepped[0]
    other = submit(engine, generation("other", (3,) * 8, max_new_tokens=400))
    runner.wait_for_step()
    if state == "waiting":
        filler = submit(engine, generation("filler", (4,) * 8, max_new_tokens=400))
    stream = submit(engine, generation("gone", (9,) * (100 if state == "mid-prefill" else 20)))
    for _ in range(2 if state == "mid-prefill" else 4):
        runner.allow()
        plan = runner.wait_for_step()
    planned = {sequence.request_id: sequence for sequence in plan.sequences}
    assert ("gone" in planned) == (state != "waiting")
    assert state == "waiting" or bool(planned["gone"].choices) == (state == "running")

    assert engine.cancel("gone")
    runner.allow()
    plan = runner.wait_for_step()
    owned = {block for sequence in plan.sequences for block in sequence.block_table}
    assert "gone" not in {sequence.request_id for sequence in plan.sequences}
    assert collect(stream).finish.reason is FinishReason.CANCELLED
    assert not engine.cancel("gone")
    runner.allow()
    runner.wait_for_step()
    assert engine.load.num_free_blocks == 64 - len(owned)
    for name in ("other", "filler"):
        engine.cancel(name)
    runner.run_free()
    assert collect(other).finish.reason is FinishReason.CANCELLED
    if state == "waiting":
        collect(filler)
    assert engine.load.num_free_blocks == 64


def test_steps_go_on_between_the_ends_of_many_requests(
    make_engine: Callable[..., Engine], stepped: list[SteppedRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(step=3600)
    monkeypatch.setattr("time.thread_time", lambda: float(next(seconds)))  # one command takes longer than a step
    engine = make_engine(max_running_requests=1, max_waiting_requests=20)
    runner = stepped[0]
    running = submit(engine, generation("running", max_new_tokens=400))
    streams = [submit(engine, generation(f"waiting {number}")) for number in range(20)]
    runner.wait_for_step()
    while engine.load.num_waiting < 20:
        runner.allow()
        runner.wait_for_step()
    for number in range(20):
        engine.cancel(f"waiting {number}")
    for _ in range(10):
        runner.allow()
        runner.wait_for_step()
    assert 1 < engine.num_in_flight < 21
    runner.run_free()
    assert all(collect(stream).finish.reason is FinishReason.CANCELLED for stream in streams)
    assert len(collect(running).token_ids) == 400


def test_closing_a_stream_early_cancels_the_request(
    make_engine: Callable[..., Engine], stepped: list[SteppedRunner]
) -> None:
    engine = make_engine()
    stepped[0].run_free()
    deltas = engine.stream(generation("left", max_new_tokens=1000))
    next(deltas)
    deltas.close()  # type: ignore[attr-defined]
    engine.generate(generation("next"))
    assert engine.num_in_flight == 0
    assert engine.load.num_free_blocks == 512


class FaultyRunner(Runner):
    """Fails on steps that contain token 666."""

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
        if any(666 in sequence.token_ids for sequence in plan.sequences):
            raise RuntimeError("a kernel has failed")
        return super().run(plan, chosen)


def test_failing_request_does_not_affect_others(
    use_runner: UseRunner, make_engine: Callable[..., Engine], alone: dict[str, Generation]
) -> None:
    use_runner(FaultyRunner)
    engine = make_engine()
    requests = mixed_requests(16)
    streams = [submit(engine, request) for request in requests[:8]]
    bad = submit(engine, generation("bad", (1, 2, 666)))
    streams += [submit(engine, request) for request in requests[8:]]
    with pytest.raises(InternalError):
        collect(bad)
    assert_same_tokens({stream.request_id: collect(stream) for stream in streams}, alone)
    assert engine.load.num_free_blocks == 512
    assert not engine.is_stalled(60)


class LostDevice(Runner):
    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:  # noqa: ARG002
        raise DeviceLostError("an illegal memory access was encountered")


def test_lost_device_stops_the_engine(use_runner: UseRunner, make_engine: Callable[..., Engine]) -> None:
    use_runner(LostDevice)
    engine = make_engine()
    stream = submit(engine, generation("a"))
    with pytest.raises(UnavailableError, match="illegal memory access"):
        collect(stream)
    with pytest.raises(UnavailableError, match="illegal memory access"):
        engine.generate(generation())


def test_a_device_that_is_lost_during_a_step_stops_the_engine(
    monkeypatch: pytest.MonkeyPatch, make_engine: Callable[..., Engine]
) -> None:
    class LostReceipt(Receipt):
        def read(self) -> list[int]:
            raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(sampler, "Receipt", LostReceipt)
    with pytest.raises(UnavailableError, match="illegal memory access"):
        make_engine().generate(generation())


def test_closing_fails_requests_in_flight(make_engine: Callable[..., Engine], stepped: list[SteppedRunner]) -> None:
    engine = make_engine()
    stream = submit(engine, generation(max_new_tokens=1000))
    stepped[0].wait_for_step()
    closing = threading.Thread(target=engine.close)
    closing.start()
    stepped[0].run_free()
    closing.join()
    with pytest.raises(UnavailableError):
        collect(stream)
    with pytest.raises(UnavailableError):
        engine.generate(generation())


def test_engine_has_stalled_if_a_step_does_not_complete(
    make_engine: Callable[..., Engine], stepped: list[SteppedRunner]
) -> None:
    engine = make_engine()
    assert not engine.is_stalled(0.0)
    stream = submit(engine, generation())
    stepped[0].wait_for_step()
    assert engine.is_stalled(0.0)
    assert not engine.is_stalled(60.0)
    stepped[0].run_free()
    collect(stream)
    assert not engine.is_stalled(0.0)


def test_higher_priority_runs_first(make_engine: Callable[..., Engine], stepped: list[SteppedRunner]) -> None:
    engine = make_engine(max_running_requests=1)
    order: list[str] = []
    first = submit(engine, generation("first"))
    stepped[0].wait_for_step()
    streams: dict[str, Any] = {
        name: submit(engine, generation(name, priority=priority, max_new_tokens=2))
        for name, priority in (("low", -1), ("middle", 0), ("high", 0))
    }
    stepped[0].run_free()
    collect(first)
    order = sorted(streams, key=lambda name: collect(streams[name]).stats.scheduled_time_s or 0)
    assert order == ["middle", "high", "low"]


def test_an_engine_without_an_event_loop_has_no_asynchronous_streams(shared_engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="use a ThreadStream"):
        shared_engine.submit(generation(), AsyncStream)


def test_a_closed_engine_without_references_frees_its_model_at_once() -> None:
    gc.disable()
    try:
        engine, _ = load.load_engine(demo_settings())
        with engine:
            engine.generate(GenerationRequest("r", "Once", stopping=StoppingCriteria(max_new_tokens=2)))
        freed = weakref.ref(engine)
        del engine
        assert freed() is None
    finally:
        gc.enable()


def test_a_closed_engine_holds_none_of_the_requests_that_it_refuses(make_engine: Callable[..., Engine]) -> None:
    engine, request = make_engine(), generation()
    engine.close()
    gc.disable()
    try:
        with pytest.raises(UnavailableError, match="the engine is closed"):
            engine.generate(request)
        freed = weakref.ref(request)
        del request
        assert freed() is None
    finally:
        gc.enable()


def test_outputs_are_resumed_beside_the_first_one_even_if_that_has_already_ended(shared_engine: Engine) -> None:
    request = generation(sampling=SamplingParameters(seed=5, num_sequences=3), max_new_tokens=8)
    whole = shared_engine.generate(request)
    ended, begun = PartialOutput(0, whole.outputs[0].token_ids), PartialOutput(2, whole.outputs[2].token_ids[:3])
    rest = shared_engine.generate(replace(request, resume_outputs=(begun, ended)))
    assert [output.token_ids for output in rest.outputs] == [(), whole.outputs[2].token_ids[3:]]
    assert [output.finish for output in rest.outputs] == [whole.outputs[0].finish, whole.outputs[2].finish]
    assert rest.stats.num_output_tokens == 5
