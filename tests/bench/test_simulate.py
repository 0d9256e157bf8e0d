"""The simulation of several servers takes the steps that the server would."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import quantiles

import pytest

from benchmarks.gpu_plan import DATA_SHEETS, MPT_7B, step_cost
from benchmarks.simulate import LEAST, arrivals, card_seconds, card_tokens, read_trace, traced_arrivals
from benchmarks.simulate_chats import CHAT_ROUTERS, chats, measure
from benchmarks.simulation import ROUTERS, Request, simulate
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.request import CacheOptions, GenerationRequest, SamplingParameters, StoppingCriteria
from mpt_grpc.schedule.block_pool import BlockPool
from mpt_grpc.schedule.scheduler import Scheduler, SchedulerLimits
from mpt_grpc.settings import SchedulerSettings
from mpt_grpc.step import StepResult


def one_second(*_: int) -> float:
    return 1.0


def test_a_request_alone_takes_the_steps_of_its_prompt_and_one_for_each_further_token() -> None:
    request = Request(10.0, prompt_tokens=1200, output_tokens=5)  # 512 tokens a step
    simulate([request], 1, 10_000, one_second, LEAST)
    assert (request.first_token_s, request.end_s) == (13.0, 17.0)


def test_requests_share_steps_and_wait_for_memory() -> None:
    requests = [Request(0.0, 100, 5) for _ in range(3)]
    simulate(requests, 1, 220, one_second, LEAST)  # memory for two
    # The first one starts at once and the second one with the next step; the third one when the first one has ended.
    assert [request.end_s for request in requests] == [5.0, 6.0, 10.0]


def test_every_router_serves_all_and_knowing_the_load_helps() -> None:
    waits = {}
    for name, router in ROUTERS.items():
        requests = arrivals(60.0, 2000, prompt=256, output=128, max_tokens=2048)
        simulate(requests, 4, card_tokens("A100"), card_seconds("A100", 0.7), router)
        assert all(request.arrival_s < request.first_token_s <= request.end_s for request in requests)
        waits[name] = sum(request.first_token_s - request.arrival_s for request in requests)
    assert waits["least of all, as one Python client or gateway"] <= waits["random"]


def test_a_step_takes_what_the_plan_of_the_card_says() -> None:
    cost = step_cost(MPTConfig.from_dict(MPT_7B), 40, 700, chunk=300)
    assert card_seconds("H100", 0.7)(40, 700, 300) == pytest.approx(cost.seconds(DATA_SHEETS["H100"]) / 0.7)


def test_the_page_on_scaling_has_the_numbers_of_the_plan() -> None:
    page = (Path(__file__).parents[2] / "docs/scaling.md").read_text(encoding="utf-8")
    for card in ("A100", "H100", "H200"):
        seconds = card_seconds(card, 0.7)
        times = [seconds(*batch, 0) for batch in ((1, 512), (16, 512), (64, 512), (64, 2048))]
        assert f"| {card} | {' | '.join(f'{1000 * time_s:.1f} ms' for time_s in times)} |" in page


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="more than the 100 tokens"):
        simulate([Request(0.0, 100, 5)], 1, 100, one_second, LEAST)


def scheduled(requests: Sequence[Request], cache_tokens: int, seconds: Callable[[int, int, int], float]) -> None:
    """Serves requests by the server's own scheduler, with steps of the given times, and notes their times."""
    settings, now_s = SchedulerSettings(), 0.0
    limits = SchedulerLimits(settings.max_running_requests, settings.max_step_tokens, 2048, settings.prefill_slowdown)
    scheduler = Scheduler(limits, BlockPool(cache_tokens // 16, 16), frozenset())
    arriving, arrived = deque(requests), dict[int, Request]()
    while arriving or scheduler.has_work:
        if not scheduler.has_work:
            now_s = max(now_s, arriving[0].arrival_s)
        while arriving and arriving[0].arrival_s <= now_s:
            request = arriving.popleft()
            stopping = StoppingCriteria(max_new_tokens=request.output_tokens)
            added = GenerationRequest(
                f"r{len(arrived)}", "", SamplingParameters(seed=1), stopping=stopping, cache=CacheOptions(bypass=True)
            )
            ((sequence, _),) = scheduler.add(added, (1,) * request.prompt_tokens)
            arrived[sequence.sequence_id] = request
        plan = scheduler.plan()
        outputs = [step for step in plan.sequences if step.num_known == 1]
        context = sum(step.length for step in outputs) // max(1, len(outputs))
        duration_s = seconds(len(outputs), context, plan.num_tokens - len(outputs))
        now_s += duration_s
        result = StepResult({step.sequence_id: (1,) for step in plan.sequences if step.choices})
        for sequence, _ in scheduler.commit(plan, result, duration_s):
            request = arrived[sequence.sequence_id]
            request.first_token_s = request.first_token_s or now_s
            request.end_s = now_s


@pytest.mark.parametrize(("num_servers", "load"), [(1, 0.5), (3, 0.9)])
def test_the_simulation_is_close_to_the_servers_own_scheduler(num_servers: int, load: float) -> None:
    tokens, seconds = card_tokens("H200"), card_seconds("H200", 0.7)
    simulated = arrivals(load * 23.0 * num_servers, 150 * num_servers, prompt=512, output=256, max_tokens=2048)
    real = [replace(request) for request in simulated]
    simulate(simulated, num_servers, tokens, seconds, ROUTERS["in turns"])
    for server in range(num_servers):
        scheduled(real[server::num_servers], tokens, seconds)
    for name, measured in (
        ("first token", [[one.first_token_s - one.arrival_s for one in served] for served in (simulated, real)]),
        ("end", [[one.end_s - one.arrival_s for one in served] for served in (simulated, real)]),
    ):
        for cut in (9, 18):  # the median and 95%
            ours, theirs = (quantiles(values, n=20)[cut] for values in measured)
            assert ours == pytest.approx(theirs, rel=0.1), (name, cut)


def test_a_conversation_is_computed_once_until_others_take_its_room() -> None:
    turns = [
        Request(0.0, 600, 5, conversation=1),
        Request(100.0, 1000, 5, conversation=1),
        Request(200.0, 2000, 5, conversation=2),
        Request(300.0, 1400, 5, conversation=1),
    ]
    simulate(turns, 1, 3000, one_second, LEAST)
    assert [turn.num_cached for turn in turns] == [0, 605, 0, 0]
    assert [turn.first_token_s - turn.arrival_s for turn in turns] == [2.0, 1.0, 4.0, 3.0]


def test_routing_by_prompt_finds_conversations_that_turns_do_not() -> None:
    hits = {}
    for name, router in CHAT_ROUTERS.items():
        requests = chats(60.0, 2000)
        simulate(requests, 4, card_tokens("A100"), card_seconds("A100", 0.7), router)
        hits[name] = measure(requests)[0]
    assert hits["by prompt"] > 2 * max(hits["in turns"], hits["fewest requests"])


def test_a_trace_is_compressed_to_the_load_and_repeated(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,9000,0\n"
    )
    requests = traced_arrivals(read_trace(file), rate=0.25, number=4, max_tokens=2048)
    assert [request.arrival_s for request in requests] == pytest.approx([0.0, 8.0, 8.0, 16.0])
    assert [(request.prompt_tokens, request.output_tokens) for request in requests[:2]] == [(374, 44), (1024, 1)]
