"""Under more load than a server can take, callers still get almost as many tokens in time as it can generate at best.

The clock is simulated: a step takes a time that its number of tokens determines, and nothing else takes any.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import replace

import pytest
from scheduler_machine import machine, request

from mpt_grpc.caller import Caller
from mpt_grpc.engine.prepare import PreparedRequest
from mpt_grpc.engine.request_table import RequestRecord, RequestTable
from mpt_grpc.engine.state import EngineLoad
from mpt_grpc.engine.stream import ThreadStream
from mpt_grpc.errors import OverloadedError
from mpt_grpc.request import GenerationRequest, StoppingCriteria
from mpt_grpc.results import Finish, FinishReason, TokenEvent

NUM_SLOTS = 4
PROMPT = (5,) * 5
NEW_TOKENS = range(4, 17)
TIMEOUT_S, END_S = 1.0, 40.0


def step_s(num_tokens: int) -> float:
    return 0.010 + 0.001 * num_tokens


SATURATION = NUM_SLOTS / step_s(NUM_SLOTS) / (sum(NEW_TOKENS) / len(NEW_TOKENS))
"""The requests per second of which the decoding alone fills all steps."""


class Simulation:
    """The requests of callers who leave after `TIMEOUT_S`, and a server that schedules them."""

    def __init__(self) -> None:
        self._machine = machine(num_blocks=400, max_running=NUM_SLOTS)
        self._requests = RequestTable(max_sequences=1000)
        self._records: dict[str, RequestRecord] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._now_s = 0.0
        self.num_sent: Counter[str] = Counter()
        self.num_served: Counter[str] = Counter()
        self.num_tokens = 0
        """What callers got in time: requests by caller, and tokens."""

    def run(self, *sent: list[tuple[float, GenerationRequest]]) -> None:
        """Serves the requests of several callers."""
        for arrival_s, wanted in heapq.merge(*sent, key=lambda one: one[0]):
            while self._now_s < arrival_s:
                if not self._machine.scheduler.has_work:
                    self._now_s = arrival_s
                    break
                self._step()
            self._send(wanted, arrival_s)

    def _send(self, wanted: GenerationRequest, arrival_s: float) -> None:
        name, scheduler = wanted.request_id, self._machine.scheduler
        record = RequestRecord(wanted, ThreadStream(name, lambda: None), None, arrival_s)
        load = EngineLoad(scheduler.num_running, scheduler.num_waiting)
        self.num_sent[wanted.caller.name] += 1
        try:
            self._requests.add(record, load, TIMEOUT_S)
        except OverloadedError:
            return
        record.prepared = PreparedRequest(wanted, PROMPT, ())
        self._machine.add(wanted, PROMPT)
        self._requests.schedule(record, [self._machine.sequences[name]])
        self._records[name] = record
        heapq.heappush(self._deadlines, (arrival_s + TIMEOUT_S, name))

    def _step(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._now_s:
            _, name = heapq.heappop(self._deadlines)
            if self._records.pop(name, None) is not None:
                self._machine.end(name)
                cancelled = TokenEvent(0, finish=Finish(FinishReason.CANCELLED))
                self._requests.report(self._machine.sequences[name], cancelled, self._now_s)
        plan = self._machine.plan()
        for sequence_id in plan.started:
            self._records[self._machine.names[sequence_id]].scheduled_time_s = self._now_s
        self._now_s += step_s(plan.num_tokens)
        for name, event in self._machine.run(plan).items():
            sequence = self._machine.sequences[name]
            self._requests.report(sequence, event, self._now_s)
            if event.finish is not None:
                record = self._records.pop(name)
                if self._now_s <= record.arrival_time_s + TIMEOUT_S:
                    self.num_served[record.request.caller.name] += 1
                    self.num_tokens += sequence.num_output_tokens
        self._requests.take_undelivered()


def arrivals(caller: str, rate: float) -> list[tuple[float, GenerationRequest]]:
    """Returns requests that come at random times, so many each second."""
    rng, time_s, sent = random.Random(caller), 0.0, []
    while (time_s := time_s + rng.expovariate(rate)) < END_S:
        stopping = StoppingCriteria(max_new_tokens=rng.choice(NEW_TOKENS), ignore_eos=True)
        wanted = replace(request(f"{caller}{len(sent)}"), caller=Caller(caller), stopping=stopping)
        sent.append((time_s, wanted))
    return sent


def goodput(num_callers: int, load: float) -> float:
    """Returns the tokens per second of requests that end in time, under so many times the load that saturates."""
    simulation = Simulation()
    rate = load * SATURATION / num_callers
    simulation.run(*(arrivals(f"caller {number} ", rate) for number in range(num_callers)))
    return simulation.num_tokens / END_S


@pytest.mark.parametrize("num_callers", [1, 4])
def test_three_times_the_load_leaves_nine_tenths_of_the_goodput(num_callers: int) -> None:
    peak = max(goodput(num_callers, load) for load in (1, 1.5))
    assert peak > 0.8 * NUM_SLOTS / step_s(NUM_SLOTS)
    assert goodput(num_callers, load=3) > 0.9 * peak


def test_the_deadlines_of_a_caller_are_met_beside_one_who_sends_too_much() -> None:
    simulation = Simulation()
    simulation.run(arrivals("flood ", 3 * SATURATION), arrivals("other ", 0.2 * SATURATION))
    assert simulation.num_served["other "] > 0.9 * simulation.num_sent["other "]
    assert simulation.num_served["flood "] < 0.4 * simulation.num_sent["flood "]
