"""The reports of an engine arrive in order, whatever their readers."""

from __future__ import annotations

import asyncio

import pytest
from conftest import demo_settings, generation

from mpt_grpc.engine import load
from mpt_grpc.engine.stream import AsyncStream
from mpt_grpc.errors import DrainingError
from mpt_grpc.reports import RequestReport, StepReport


class Reports:
    """An observer that records which requests the reports are about."""

    trace_interval = None

    def __init__(self) -> None:
        self.seen: list[str] = []

    def observe_step(self, report: StepReport) -> None:
        self.seen.append(f"a step of {report.plan.sequences[0].token_ids[0]}")

    def observe_request(self, report: RequestReport) -> None:
        self.seen.append(f"the end of {report.request.prompt[0]}")  # type: ignore[index]


async def test_the_steps_of_a_request_come_after_the_end_of_the_one_before_with_the_same_id() -> None:
    reports = Reports()
    engine, _ = load.load_engine(demo_settings(), loop=asyncio.get_running_loop())
    with engine:
        engine.observe(reports)
        streams = []
        for prompt in ((1, 2), (3, 4)):  # while the loop is busy here, all reports wait
            streams.append(engine.submit(generation("r", prompt, max_new_tokens=1), AsyncStream))
            while engine.state().result(30).in_flight:
                pass
        for stream in streams:
            _ = [delta async for delta in stream]
        await asyncio.sleep(0)
    assert reports.seen == ["a step of 1", "the end of 1", "a step of 3", "the end of 3"]


async def test_requests_that_are_cut_off_when_the_engine_closes_are_reported_before_their_error() -> None:
    reports = Reports()
    engine, _ = load.load_engine(demo_settings(), loop=asyncio.get_running_loop())
    with engine:
        engine.observe(reports)
        stream = engine.submit(generation("r", (1, 2), max_new_tokens=1000), AsyncStream)
        await anext(aiter(stream))
        await asyncio.to_thread(engine.close)
        with pytest.raises(DrainingError):
            _ = [delta async for delta in stream]
    assert reports.seen[-1] == "the end of 1"
