"""The simulation of several servers takes the steps that the server would."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu_plan import DATA_SHEETS, MPT_7B, step_cost
from benchmarks.simulate import ROUTERS, Request, arrivals, card_seconds, card_tokens, simulate
from mpt_grpc.model.config import MPTConfig

LEAST = ROUTERS["least of all"]


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
    assert waits["least of all"] <= waits["random"]


def test_a_step_takes_what_the_plan_of_the_card_says() -> None:
    cost = step_cost(MPTConfig.from_dict(MPT_7B), 40, 700, chunk=300)
    assert card_seconds("H100", 0.7)(40, 700, 300) == pytest.approx(cost.seconds(DATA_SHEETS["H100"]) / 0.7)


def test_the_page_on_scaling_has_the_numbers_of_the_plan() -> None:
    page = (Path(__file__).parents[2] / "docs/scaling.md").read_text(encoding="utf-8")
    for card in ("L4", "A100", "H200"):
        tokens = card_tokens(card)
        assert f" {tokens:,} tokens | {tokens // 768} | {tokens // 2048} |" in page
    for card in ("A100", "H100", "H200"):
        seconds = card_seconds(card, 0.7)
        times = [seconds(*batch, 0) for batch in ((1, 512), (16, 512), (64, 512), (64, 2048))]
        assert f"| {card} | {' | '.join(f'{1000 * time_s:.1f} ms' for time_s in times)} |" in page


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="more than the 100 tokens"):
        simulate([Request(0.0, 100, 5)], 1, 100, one_second, LEAST)
