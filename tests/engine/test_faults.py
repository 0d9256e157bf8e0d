"""Faults of the memory and of the tokenizer, which end at most the requests that have them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest
import torch
from conftest import UseRunner, demo_settings, generation, submit
from torch import Tensor

from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.stream import collect
from mpt_grpc.errors import InternalError
from mpt_grpc.model import sampler
from mpt_grpc.model.runner import Runner, StepOutput
from mpt_grpc.model.transfer import Receipt
from mpt_grpc.server.server import running_server
from mpt_grpc.step import StepPlan
from mpt_grpc_client import AsyncClient
from mpt_grpc_client import InternalError as ReportedError

POISON = 666
"""A token of prompts whose requests have the fault."""


class SmallMemory(Runner):
    """Has no memory for steps of many tokens."""

    num_failed = 0

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
        if plan.num_tokens > 40:
            self.num_failed += 1
            raise MemoryError("no memory")
        return super().run(plan, chosen)


def test_steps_that_do_not_fit_in_memory_are_computed_in_parts(
    use_runner: UseRunner, make_engine: Callable[..., Engine], shared_engine: Engine
) -> None:
    requests = [generation(f"r{number}", tuple(range(100, 130 + number))) for number in range(8)]
    expected = [shared_engine.generate(request).token_ids for request in requests]
    runners = use_runner(SmallMemory)
    engine = make_engine()
    streams = [submit(engine, request) for request in requests]
    assert [collect(stream).token_ids for stream in streams] == expected
    assert runners[0].num_failed > 0
    assert engine.load.num_free_blocks == 512


def test_what_a_step_that_failed_held_is_free_when_it_is_computed_in_parts(
    use_runner: UseRunner, make_engine: Callable[..., Engine]
) -> None:
    tensors: list[weakref.ref[Tensor]] = []
    num_held: list[int] = []

    class Holding(Runner):
        def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
            num_held.append(sum(tensor() is not None for tensor in tensors))
            try:
                return self._run_holding(plan, chosen)
            except torch.OutOfMemoryError as error:
                raise MemoryError(str(error)) from error

        def _run_holding(self, plan: StepPlan, chosen: Tensor | None) -> StepOutput:
            hidden = torch.zeros(plan.num_tokens)
            tensors.append(weakref.ref(hidden))
            if plan.num_tokens > 40:
                raise torch.OutOfMemoryError("no memory")
            return super().run(plan, chosen)

    use_runner(Holding)
    engine = make_engine()
    for stream in [submit(engine, generation(f"r{number}", tuple(range(100, 120)))) for number in range(8)]:
        collect(stream)
    assert len(num_held) > 8
    assert set(num_held) == {0}


@pytest.mark.parametrize("error", ["OutOfMemoryError", "AcceleratorError"])
def test_memory_that_the_sampler_lacks_makes_steps_smaller(
    error: str, monkeypatch: pytest.MonkeyPatch, make_engine: Callable[..., Engine], shared_engine: Engine
) -> None:
    """Memory of the host that a GPU reads is one of the things that are no tensors: CUDA's own error says so."""
    requests = [generation(f"r{number}", (100, 101, 102 + number)) for number in range(8)]
    expected = [shared_engine.generate(request).token_ids for request in requests]
    failures: list[Exception] = []

    class Crowded(Receipt):
        def __init__(self, tensor: Tensor) -> None:
            if len(tensor) > 3 * 4:
                failures.append(failure := getattr(torch, error)("out of memory"))
                failure.error_code = 2  # type: ignore[attr-defined]
                raise failure
            super().__init__(tensor)

    monkeypatch.setattr(sampler, "Receipt", Crowded)
    engine = make_engine()
    assert [collect(stream).token_ids for stream in [submit(engine, one) for one in requests]] == expected
    assert failures
    assert engine.failure is None


class FaultyTokenizer:
    """A tokenizer whose detokenizers fail for prompts with the poisonous token: when they are made, or later."""

    def __init__(self, tokenizer: Any, *, fails_at_once: bool) -> None:
        self._tokenizer, self._fails_at_once = tokenizer, fails_at_once

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def detokenizer(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> Any:
        if POISON not in prompt_token_ids:
            return self._tokenizer.detokenizer(prompt_token_ids, skip_special_tokens)
        if self._fails_at_once:
            raise UnicodeError("a tokenizer has failed")
        return FaultyDetokenizer()


class FaultyDetokenizer:
    def feed(self, token_id: int) -> str:
        raise UnicodeError(f"no text for {token_id}")

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize("is_quick", [True, False], ids=["on the loop", "in a thread"])
def test_a_tokenizer_that_fails_before_the_first_token_frees_the_place(
    make_engine: Callable[..., Engine], is_quick: bool
) -> None:
    engine = make_engine(max_running_requests=1, max_waiting_requests=0)
    engine.preparation.tokenizer = FaultyTokenizer(engine.preparation.tokenizer, fails_at_once=True)
    prompt = (POISON,) if is_quick else (POISON,) * 1500
    for _ in range(2):
        with pytest.raises(InternalError, match="could not be prepared: UnicodeError"):
            engine.generate(generation("bad", prompt))
    assert len(engine.generate(generation("good")).token_ids) == 24


async def test_a_tokenizer_that_fails_in_mid_stream_ends_its_own_request(caplog: pytest.LogCaptureFixture) -> None:
    async with running_server(demo_settings(64)) as server, AsyncClient(server.target) as client:
        expected = await client.generate("The fox", max_new_tokens=60, temperature=0)
        preparation = server.engine.preparation
        preparation.tokenizer = FaultyTokenizer(preparation.tokenizer, fails_at_once=False)
        stream = client.stream("The fox", max_new_tokens=60, temperature=0)
        with pytest.raises(ReportedError, match="see the server's log") as caught:
            await client.generate([1, POISON], max_new_tokens=60)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.INTERNAL, "ENGINE_FAULT")
        assert "".join([text async for text in stream]) == expected.text
        while server.engine.num_in_flight:
            await client.get_server_info()
        assert server.engine.load.num_free_blocks == 64
    assert any("Generate failed" in message for message in caplog.messages)
