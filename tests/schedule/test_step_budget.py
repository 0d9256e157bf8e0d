"""How many tokens a step may compute, given the times of the last ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mpt_grpc.schedule.step_budget import StepBudget


def test_prompts_that_may_not_slow_outputs_down_advance_by_one_token_every_other_step() -> None:
    decoding, prefilling = SimpleNamespace(num_uncomputed=1), SimpleNamespace(num_uncomputed=100)
    running: list[Any] = [decoding, decoding, decoding, prefilling]
    budget = StepBudget(max_tokens=64, min_tokens=1, prefill_slowdown=1)
    assert budget.num_tokens(running, has_waiting=True) == 4
    budget.record(4, 1.0)
    assert budget.num_tokens(running, has_waiting=True) == 5
