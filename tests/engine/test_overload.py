"""Under more load than a server can take, callers still get almost as many tokens in time as it can generate at best.

The clock is simulated: only steps take time, by their number of tokens.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from scheduler_machine import machine, request

from mpt_grpc.caller import Caller
from mpt_grpc.engine.prepare import PreparedRequest
from mpt_grpc.engine.request_record import RequestRecord
from mpt_grpc.engine.request_table import RequestTable
from mpt_grpc.engine.state import EngineLoad
from mpt_grpc.engine.stream import ThreadStream
from mpt_grpc.errors import OverloadedError
from mpt_grpc.request import GenerationRequest, StoppingCriteria
from mpt_grpc.results import Finish, FinishReason, TokenEvent

PROMPT = (5,) * 5
END_S = 20.0


@dataclass(frozen=True)
class Server:
    """What a server has to do with, and for how long callers wait for it."""

    num_slots: int
    new_tokens: Sequence[int]
    timeout_s: float
    slow_factors: Sequence[int] = (1,)
    """How many times as long as usual a step takes, by chance, as on a machine that others use, too."""

    def step_s(self, num_tokens: int, now_s: float = 0.0) -> float:
        slow = random.Random(now_s).choice(self.slow_factors)
        return (0.010 + 0.001 * num_tokens) * slow

    @property
    def saturation(self) -> float:
        """The requests per second of which the decoding alone fills all steps."""
        return self.num_slots / self.step_s(self.num_slots) / (sum(self.new_tokens) / len(self.new_tokens))


QUICK = Server(num_slots=4, new_tokens=range(4, 17), timeout_s=1.0)
"""Whose requests run for a fraction of the time that callers wait."""
SLOW = Server(num_slots=16, new_tokens=(32,), timeout_s=1.25)
"""Whose requests run for most of it."""


class Simulation:
    """The requests of callers who leave when their time is over, and a server that schedules them."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._machine = machine(num_blocks=1000, max_running=server.num_slots, max_step_tokens=8 * server.num_slots)
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
        record = RequestRecord(wanted, ThreadStream(name, lambda: None), None, arrival_s, self._server.timeout_s)
        load = EngineLoad(scheduler.num_running, scheduler.num_waiting)
        self.num_sent[wanted.caller.name] += 1
        try:
            self._requests.add(record, load)
        except OverloadedError:
            return
        record.prepared = PreparedRequest(wanted, PROMPT, ())
        self._machine.add(wanted, PROMPT)
        self._requests.schedule(record, [self._machine.sequences[name]])
        self._records[name] = record
        heapq.heappush(self._deadlines, (arrival_s + self._server.timeout_s, name))

    def _step(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._now_s:
            _, name = heapq.heappop(self._deadlines)
            if self._records.pop(name, None) is not None:
                self._machine.end(name)
                cancelled = TokenEvent(0, finish=Finish(FinishReason.CANCELLED))
                self._requests.report(self._machine.sequences[name], cancelled, self._now_s)
        for late, error in self._requests.late(self._now_s):
            self._machine.end(late.request.request_id)
            self._requests.fail(late, error, self._now_s)
            del self._records[late.request.request_id]
        plan, start_s = self._machine.plan(), self._now_s
        for sequence_id in plan.started:
            self._records[self._machine.names[sequence_id]].scheduled_time_s = start_s
        duration_s = self._server.step_s(plan.num_tokens, start_s)
        self._now_s += duration_s
        events = self._machine.run(plan)
        new_tokens = {self._machine.sequences[name].sequence_id: 1 for name in events}
        self._requests.measure_step(new_tokens, duration_s)
        for name, event in events.items():
            sequence = self._machine.sequences[name]
            self._requests.report(sequence, event, self._now_s)
            if event.finish is not None:
                record = self._records.pop(name)
                if self._now_s <= record.arrival_time_s + self._server.timeout_s:
                    self.num_served[record.request.caller.name] += 1
                    self.num_tokens += sequence.num_output_tokens
        self._requests.take_undelivered()


def arrivals(server: Server, caller: str, load: float) -> list[tuple[float, GenerationRequest]]:
    """Returns requests that come at random times; under a load of 1 they saturate the server."""
    rng, time_s, sent = random.Random(caller), 0.0, []
    while (time_s := time_s + rng.expovariate(load * server.saturation)) < END_S:
        stopping = StoppingCriteria(max_new_tokens=rng.choice(server.new_tokens), ignore_eos=True)
        wanted = replace(request(f"{caller}{len(sent)}"), caller=Caller(caller), stopping=stopping)
        sent.append((time_s, wanted))
    return sent


def goodput(server: Server, num_callers: int, load: float) -> float:
    """Returns the tokens per second of requests that end in time, under so many times the load that saturates."""
    simulation = Simulation(server)
    simulation.run(*(arrivals(server, f"caller {number} ", load / num_callers) for number in range(num_callers)))
    return simulation.num_tokens / END_S


@pytest.mark.parametrize(
    ("server", "num_callers"),
    [(QUICK, 1), (QUICK, 4), (SLOW, 1), (replace(SLOW, slow_factors=(1, 1, 1, 4)), 1)],
    ids=["quick", "quick with callers that take turns", "slow", "slow at random"],
)
def test_three_times_the_load_leaves_nine_tenths_of_the_goodput(server: Server, num_callers: int) -> None:
    peak = max(goodput(server, num_callers, load) for load in (1, 1.5))
    if server.slow_factors == (1,):
        assert peak > 0.8 * server.num_slots / server.step_s(server.num_slots)
    assert goodput(server, num_callers, load=3) > 0.9 * peak


def test_the_deadlines_of_a_caller_are_met_beside_one_who_sends_too_much() -> None:
    simulation = Simulation(QUICK)
    simulation.run(arrivals(QUICK, "flood ", 3), arrivals(QUICK, "other ", 0.2))
    assert simulation.num_served["other "] > 0.9 * simulation.num_sent["other "]
    assert simulation.num_served["flood "] < 0.4 * simulation.num_sent["flood "]
