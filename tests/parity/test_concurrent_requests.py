"""Concurrent requests: each gives the same result as when it runs alone, whatever the other requests are.

Every round has 16 requests with random combinations of all features, random arrivals, a cache too small for all of them
(so that some are preempted) and a random token budget per step. Computed in float32 on the demo model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from conftest import UseRunner, submit
from torch import Tensor

from mpt_grpc.constraint import Choice, JsonObject, JsonSchema, LarkGrammar, Regex
from mpt_grpc.conversation import Conversation, Message
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.stream import ThreadStream, collect
from mpt_grpc.model.runner import Runner, StepOutput
from mpt_grpc.request import (
    CacheOptions,
    DecodingOptions,
    GenerationRequest,
    LogprobOptions,
    PartialOutput,
    RepetitionGuard,
    SamplingParameters,
    StoppingCriteria,
)
from mpt_grpc.results import Generation, OutputDelta, TokenLogprob
from mpt_grpc.step import StepPlan

NUM_REQUESTS = 16
NUM_ROUNDS = 6
PROMPTS = (
    "Once upon a time",
    "Once upon a time there was a king who had three sons. The eldest said to his father, ",
    "The fox looked at the crow and said: ",
    "Down by the river " * 6,
    "and and and and and and and",
    Conversation((Message("user", "What did the fox say?"),)),
    Conversation((Message("system", "Be kind."), Message("user", "Tell me about the king."))),
)
CONSTRAINTS = (
    JsonObject(),
    JsonSchema('{"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"]}'),
    Regex(r"(the|a) [a-z]{2,8}( and [a-z]{2,8})*\."),
    Choice(("the fox", "the king", "the king's son")),
    LarkGrammar('start: "once" (" upon" | " more")+ "!"'),
)


def random_request(name: str, rng: Random) -> GenerationRequest:
    """Returns a request in which each feature is enabled about one time in three."""

    def sometimes(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.35 else default

    constraint = sometimes(rng.choice(CONSTRAINTS), None)
    max_new_tokens = rng.randint(1, 28)
    is_scored = rng.random() < 0.3
    return GenerationRequest(
        name,
        rng.choice(PROMPTS),
        SamplingParameters(
            temperature=rng.choice([0.0, 0.7, 1.0, 1.4]),
            top_k=sometimes(rng.randint(1, 100), 0),
            top_p=sometimes(rng.uniform(0.3, 1), 1.0),
            min_p=sometimes(rng.uniform(0, 0.1), 0.0),
            typical_p=sometimes(rng.uniform(0.3, 1), 1.0),
            seed=rng.getrandbits(64),
            num_sequences=sometimes(rng.randint(2, 4), 1),
        ),
        decoding=DecodingOptions(
            repetition_penalty=sometimes(rng.uniform(0.8, 2), 1.0),
            frequency_penalty=sometimes(rng.uniform(-1, 1), 0.0),
            presence_penalty=sometimes(rng.uniform(-1, 1), 0.0),
            logit_bias=sometimes({rng.randrange(4096): rng.uniform(-20, 8) for _ in range(9)}, {}),
            allowed_token_ids=() if constraint else sometimes(tuple(rng.sample(range(4096), 400)), ()),
            constraint=constraint,
        ),
        stopping=StoppingCriteria(
            max_new_tokens=max_new_tokens,
            min_new_tokens=sometimes(rng.randint(0, max_new_tokens), 0),
            stop_strings=sometimes(("ing", ". "), ()),
            stop_token_ids=sometimes(tuple(rng.sample(range(300), 20)), ()),
            include_stop_string=rng.random() < 0.5,
            ignore_eos=constraint is None and rng.random() < 0.3,
            repetition_guard=sometimes(RepetitionGuard(rng.randint(2, 4), rng.randint(1, 8)), None),
        ),
        logprobs=LogprobOptions(prompt=is_scored, output=rng.random() < 0.3 or is_scored, num_top=2 * is_scored),
        cache=CacheOptions(bypass=rng.random() < 0.2),
        priority=rng.randint(-1, 1),
        truncate_prompt_tokens=None,
    )


def without_needs(request: GenerationRequest) -> GenerationRequest:
    """Returns the request without what needs its tokens on the host before the next step."""
    decoding = replace(
        request.decoding, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0, constraint=None
    )
    return replace(request, decoding=decoding, logprobs=LogprobOptions())


class ArrivingRunner(Runner):
    """Submits requests just before predetermined steps."""

    arrivals: Iterator[tuple[int, Callable[[], None]]] = iter(())
    due: tuple[int, Callable[[], None]] | None = None
    num_steps = 0
    num_ahead = 0
    """The number of steps that were launched before the tokens of the one before were read."""

    def expect(self, arrivals: list[tuple[int, Callable[[], None]]]) -> None:
        self.arrivals = iter(arrivals)
        self.due = next(self.arrivals, None)
        self.num_steps = 0

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
        while self.due is not None and self.due[0] <= self.num_steps:
            self.due[1]()
            self.due = next(self.arrivals, None)
        self.num_steps += 1
        self.num_ahead += chosen is not None
        return super().run(plan, chosen)


@pytest.fixture
def runners(use_runner: UseRunner) -> list[ArrivingRunner]:
    return use_runner(ArrivingRunner)


def resumed_after(
    request: GenerationRequest, deltas: list[OutputDelta], num_tokens: int
) -> tuple[GenerationRequest, Generation]:
    """Returns the request that resumes one which was interrupted after `num_tokens` tokens, and its expected result."""
    received = {index: list[int]() for index in request.outputs}
    num_received = 0
    for position, delta in enumerate(deltas):
        if num_received >= num_tokens:
            rest = replace(collect(deltas[position:]), prompt_logprobs=deltas[0].prompt_logprobs)
            if request.sampling.num_sequences == 1:
                return replace(request, resume_token_ids=tuple(received[0])), rest
            outputs = [PartialOutput(index, tuple(token_ids)) for index, token_ids in received.items()]
            return replace(request, resume_outputs=tuple(outputs[::-1])), rest
        received[delta.index] += delta.token_ids
        num_received += len(delta.token_ids)
        if delta.finish is not None:
            del received[delta.index]
    return request, collect(deltas)


def assert_same(name: str, actual: Generation, expected: Generation) -> None:
    assert len(actual.outputs) == len(expected.outputs), name
    for one, other in zip(actual.outputs, expected.outputs, strict=True):
        assert one.token_ids == other.token_ids, name
        assert (one.text, one.finish) == (other.text, other.finish), name
        assert_same_logprobs(one.logprobs, other.logprobs)
    if actual.prompt_logprobs:  # absent if the resumed output had already ended
        assert_same_logprobs(actual.prompt_logprobs, expected.prompt_logprobs)


def assert_same_logprobs(actual: Sequence[TokenLogprob], expected: Sequence[TokenLogprob]) -> None:
    assert [p.token_id for p in actual] == [p.token_id for p in expected]
    assert [p.logprob for p in actual] == pytest.approx([p.logprob for p in expected], abs=1e-3)


@pytest.fixture
def runs_ahead(request: pytest.FixtureRequest) -> bool:
    """Whether the engine launches steps ahead; a parameter."""
    if request.param:
        request.getfixturevalue("running_ahead")
    return bool(request.param)


@pytest.mark.parametrize(
    ("seed", "runs_ahead"),
    [*((seed, False) for seed in range(NUM_ROUNDS)), *((seed, True) for seed in range(NUM_ROUNDS, 2 * NUM_ROUNDS))],
    indirect=["runs_ahead"],
)
def test_16_concurrent_requests_yield_the_same_results_as_alone(
    seed: int,
    shared_engine: Engine,
    runs_ahead: bool,
    make_engine: Callable[..., Engine],
    runners: list[ArrivingRunner],
) -> None:
    """Few requests of those rounds in which steps are launched ahead prevent that."""
    rng = Random(seed)
    requests: list[GenerationRequest] = []
    expected: dict[str, Generation] = {}
    for number in range(NUM_REQUESTS):
        request = random_request(f"r{number}", rng)
        if runs_ahead and rng.random() < 0.9:
            request = without_needs(request)
        if number == 0:  # runs until all others have arrived
            stopping = StoppingCriteria(max_new_tokens=3 * NUM_REQUESTS, ignore_eos=True)
            request = GenerationRequest("r0", PROMPTS[0], SamplingParameters(seed=seed), stopping=stopping, priority=2)
        deltas = list(shared_engine.stream(request))
        expected[request.request_id] = collect(deltas)
        if number and rng.random() < 0.4:
            request, expected[request.request_id] = resumed_after(request, deltas, rng.randint(1, 20))
        requests.append(request)

    engine = make_engine(
        num_blocks=rng.randint(12, 15), max_running_requests=rng.randint(6, 16), max_step_tokens=rng.randint(16, 48)
    )
    streams: list[ThreadStream] = []
    arrivals = sorted(rng.randint(0, 2 * NUM_REQUESTS) for _ in requests[1:])
    runners[0].expect(
        [(step, lambda r=r: streams.append(submit(engine, r))) for step, r in zip(arrivals, requests[1:], strict=True)]
    )
    first = collect(submit(engine, requests[0]))
    generations = {"r0": first} | {s.request_id: collect(s) for s in streams}
    assert set(generations) == set(expected)
    for name, generation in generations.items():
        assert_same(name, generation, expected[name])
    assert sum(generation.stats.num_preemptions for generation in generations.values()) > 0
    assert (runners[0].num_ahead > 0) == runs_ahead
