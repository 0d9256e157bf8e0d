"""The intervals at which a busy event loop gets events."""

import asyncio
import heapq
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from conftest import demo_settings, generation

from mpt_grpc.engine import load
from mpt_grpc.engine.outbox import Outbox
from mpt_grpc.engine.stream import AsyncStream
from mpt_grpc.request import LogprobOptions, SamplingParameters, StoppingCriteria


class _Loop:
    """An event loop with a clock of its own, which only `time_s` and timers move."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self._order = itertools.count()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []

    def time(self) -> float:
        return self.time_s

    def is_closed(self) -> bool:
        return False

    def call_later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._queue, (self.time_s + delay_s, next(self._order), lambda: callback(*args)))

    def call_soon(self, callback: Callable[..., None], *args: Any) -> None:
        self.call_later(0, callback, *args)

    call_soon_threadsafe = call_soon

    def run(self) -> None:
        while self._queue:
            due_s, _, callback = heapq.heappop(self._queue)
            self.time_s = max(self.time_s, due_s)
            callback()


@pytest.mark.parametrize(
    ("reader_s", "next_s"), [(0.0005, 0.0005), (0.004, 0.012), (0.008, 0.024), (0.019, 0.039), (0.030, 0.050)]
)
def test_the_next_hand_over_waits_twice_as_long_as_the_readers_took_and_at_most_20_ms(
    reader_s: float, next_s: float
) -> None:
    loop = _Loop()
    outbox = Outbox(cast(asyncio.AbstractEventLoop, loop))
    received: list[tuple[float, int]] = []

    def receive(event: int) -> None:
        received.append((loop.time_s, event))
        if event == 0:  # two steps end while its readers work
            loop.time_s += reader_s
            outbox.put([(receive, 1)])
            outbox.put([(receive, 2)])

    outbox.put([(receive, 0)])
    loop.run()
    times_s, events = zip(*received, strict=True)
    assert events == (0, 1, 2)
    assert times_s == pytest.approx([0, next_s, next_s])


async def test_what_is_yet_to_be_handed_over_is_waited_for() -> None:
    loop = asyncio.get_running_loop()
    outbox = Outbox(loop)
    received: list[int] = []

    def receive(event: int) -> None:
        received.append(event)
        if event == 0:
            begin_s = loop.time()
            while loop.time() < begin_s + 0.002:  # long enough for the next hand-over to wait
                pass
            outbox.put([(receive, 1)])

    outbox.put([(receive, 0)])
    await outbox.delivered()
    assert received == [0, 1]


def test_tokens_do_not_wait_for_the_ends_of_many_requests_which_keep_their_order() -> None:
    loop = _Loop()
    outbox = Outbox(cast(asyncio.AbstractEventLoop, loop))
    received: list[str] = []

    def end(number: int) -> None:
        received.append(f"end {number}")
        if number == 20:  # a step of the others
            outbox.put([(received.append, "token 2")], [(end, 1000)])

    outbox.put([(received.append, "token 1")], [(end, number) for number in range(1000)])
    loop.run()
    assert received[:2] == ["token 1", "end 0"]
    assert received.index("token 2") < received.index("end 100")
    assert [event for event in received if event.startswith("end")] == [f"end {number}" for number in range(1001)]


async def test_an_output_that_ends_at_once_keeps_its_place_before_the_others_of_its_request() -> None:
    engine, _ = load.load_engine(demo_settings(), loop=asyncio.get_running_loop())
    request = generation(sampling=SamplingParameters(num_sequences=2, seed=1), logprobs=LogprobOptions(prompt=True))
    with engine:
        first, other = (output.token_ids[0] for output in (await asyncio.to_thread(engine.generate, request)).outputs)
        assert first != other
        stopping = StoppingCriteria(max_new_tokens=24, stop_token_ids=(first,), ignore_eos=True)
        stream = engine.submit(replace(request, stopping=stopping), AsyncStream)
        while engine.state().result(30).in_flight:  # while the loop is busy here, everything waits
            pass
        deltas = [delta async for delta in stream]
    assert (deltas[0].index, len(deltas[0].prompt_logprobs)) == (0, 3)
