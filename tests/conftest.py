"""Fixtures shared by several packages. Engines compute in float32, where results do not depend on the batch's shape."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import hypothesis
import pytest
from server_process import ServerProcess, running
from torch import Tensor

from mpt_grpc.engine import load, parts
from mpt_grpc.engine.engine import Engine
from mpt_grpc.engine.stream import ThreadStream
from mpt_grpc.model.runner import Runner, StepOutput
from mpt_grpc.request import GenerationRequest, SamplingParameters, StoppingCriteria
from mpt_grpc.settings import CacheSettings, HttpSettings, ModelSettings, SchedulerSettings, ServerSettings, Settings
from mpt_grpc.step import StepPlan

RunnerKind = TypeVar("RunnerKind", bound=Runner)

hypothesis.settings.register_profile("any machine", deadline=None)  # an example may wait for a core
hypothesis.settings.load_profile("any machine")

# The processes that tests start would compile the code at every start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_finish() -> None:
    """Leaves out the libraries and the tests, which stay, from all later collections of garbage."""
    gc.collect()
    gc.freeze()


DEMO_BLOCK_BYTES = 2 * 8 * 16 * 256 * 4
"""The size of one block of the demo model's cache in float32: keys and values, 8 layers, 16 tokens, width 256."""


def demo_settings(num_blocks: int = 512, **scheduler: Any) -> Settings:
    """Returns settings for the demo model in float32 with a cache of `num_blocks`, on a free port.

    The steps do not depend on the time that others took.
    """
    return Settings(
        model=ModelSettings(device="cpu", dtype="float32"),
        cache=CacheSettings(kv_cache_bytes=num_blocks * DEMO_BLOCK_BYTES),
        scheduler=replace(SchedulerSettings(prefill_slowdown=math.inf), **scheduler),
        server=ServerSettings(grpc_port=0, grace_s=20),
        http=HttpSettings(port=None),
    )


@pytest.fixture
def settings() -> Settings:
    return demo_settings()


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    """Starts engines on the demo model and closes them when the test ends."""
    with ExitStack() as stack:

        def make(num_blocks: int = 512, **scheduler: Any) -> Engine:
            engine, _ = load.load_engine(demo_settings(num_blocks, **scheduler))
            return stack.enter_context(engine)

        yield make


class UseRunner(Protocol):
    def __call__(self, kind: Callable[..., RunnerKind]) -> list[RunnerKind]:
        """Has `kind` make the runners of engines that are created from now on; returns the list of these runners."""
        ...


@pytest.fixture
def use_runner(monkeypatch: pytest.MonkeyPatch) -> UseRunner:
    """Gives engines another runner, such as one that fails."""

    def use(kind: Callable[..., RunnerKind]) -> list[RunnerKind]:
        runners: list[RunnerKind] = []

        def make(*arguments: Any) -> RunnerKind:
            runners.append(kind(*arguments))
            return runners[-1]

        monkeypatch.setattr(parts, "Runner", make)
        return runners

    return use


@pytest.fixture
def running_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has engines that are created in the test launch steps ahead, as on an accelerator."""
    monkeypatch.setattr(load, "Engine", lambda *parts, **options: Engine(*parts, **{**options, "runs_ahead": True}))


@pytest.fixture(scope="session")
def shared_engine() -> Iterator[Engine]:
    """One engine shared by all tests that leave no state behind."""
    engine, _ = load.load_engine(demo_settings())
    with engine:
        yield engine


def generation(
    request_id: str = "r",
    prompt: str | tuple[int, ...] = "Once upon a time",
    *,
    max_new_tokens: int | None = 24,
    sampling: SamplingParameters | None = None,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = True,
    **fields: Any,
) -> GenerationRequest:
    """Returns a request that is greedy unless `sampling` is given."""
    stopping = StoppingCriteria(max_new_tokens=max_new_tokens, stop_strings=stop, ignore_eos=ignore_eos)
    sampling = sampling or SamplingParameters(temperature=0)
    return GenerationRequest(request_id, prompt, sampling, stopping=stopping, **fields)


def submit(engine: Engine, request: GenerationRequest) -> ThreadStream:
    """Submits a request; its stream is to be read by this thread."""
    return engine.submit(request, ThreadStream)


class SteppedRunner(Runner):
    """A runner that waits before each step until the test allows it, and lets the test wait for the next step.

    A server's warm-up request runs without waiting.
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._allowed = threading.Semaphore(0)
        self._requested = threading.Semaphore(0)
        self._runs_freely = False
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan, chosen: Tensor | None = None) -> StepOutput:
        if plan.sequences[0].request_id == "warm-up":
            return super().run(plan, chosen)
        self.plans.append(plan)
        self._requested.release()
        if not self._runs_freely:
            self._allowed.acquire()
        return super().run(plan, chosen)

    def wait_for_step(self) -> StepPlan:
        """Blocks until the engine has planned a step not yet returned here, and returns its plan."""
        assert self._requested.acquire(timeout=30)
        return self.plans[-1]

    def allow(self) -> None:
        self._allowed.release()

    def run_free(self) -> None:
        self._runs_freely = True
        self._allowed.release()


@pytest.fixture
def stepped(use_runner: UseRunner) -> Iterator[list[SteppedRunner]]:
    """Gives each engine created in the test a SteppedRunner, and returns the list of these runners.

    A test must list it after the fixture that creates engines, so that runners are released before engines are closed.
    """
    runners = use_runner(SteppedRunner)
    yield runners
    for runner in runners:
        runner.run_free()


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """One server process shared by all tests that leave no state behind."""
    with running() as process:
        yield process
