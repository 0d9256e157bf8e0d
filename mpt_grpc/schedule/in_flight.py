"""The steps that have been planned but not committed.

On a CPU there is at most one, and none while a step is planned. On an accelerator a step is planned while the one
before it runs: then it is assumed that this one computes what it should, and the tokens that it chooses are pending.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from mpt_grpc.schedule.sequence import Sequence
from mpt_grpc.step import StepPlan


class _Step(NamedTuple):
    plan: StepPlan
    lost: set[int]
    """The IDs of the sequences that were preempted since: the blocks that the step fills are no longer theirs."""


class InFlight:
    """The steps in flight, the earliest first; at most two."""

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque()
        self._ahead: dict[Sequence, int] = {}
        """While a step is planned beside another: the sequences of that one, and how many tokens they have computed."""

    def add(self, plan: StepPlan) -> None:
        """Adds a step, unless it computes nothing."""
        if plan.sequences:
            self._steps.append(_Step(plan, set()))

    def remove(self, plan: StepPlan) -> set[int]:
        """Removes the earliest step, whose plan this is, and returns the IDs of the sequences that it has lost."""
        step = self._steps.popleft()
        assert step.plan is plan
        return step.lost

    def forget_next(self, plan: StepPlan) -> StepPlan | None:
        """Removes the step behind this one, and returns its plan if there is one."""
        return self._steps.pop().plan if self._steps[-1].plan is not plan else None

    def remaining(self, plan: StepPlan, sequences: Mapping[int, Sequence]) -> StepPlan:
        """Returns the plan of the only step without those that have ended or were lost, with all tokens known."""
        lost = self._steps[0].lost
        return StepPlan(
            tuple(
                step._replace(token_ids=tuple(sequences[step.sequence_id].token_ids[step.start : step.length]))
                if step.token_ids[-1] < 0
                else step
                for step in plan.sequences
                if step.sequence_id in sequences and step.sequence_id not in lost
            )
        )

    def look_ahead(self, sequences: Mapping[int, Sequence]) -> None:
        """Puts sequences into the state after the step in flight, if there is one; their new tokens are pending."""
        if not self._steps:
            return
        row = 0
        for step in self._steps[-1].plan.sequences:
            if (sequence := sequences.get(step.sequence_id)) is not None:
                self._ahead[sequence] = sequence.num_computed
                sequence.num_computed = step.length
                if step.choices and sequence.max_remaining > 1:  # else the token ends the output
                    sequence.token_ids.append(~row)
            row += len(step.choices)

    def lose(self, sequence: Sequence) -> None:
        """Has a sequence that is preempted forget the step in flight: the result will be dropped."""
        if sequence in self._ahead:
            self._restore(sequence)
            self._steps[-1].lost.add(sequence.sequence_id)

    def look_back(self) -> None:
        """Puts all sequences back into the state before the step in flight."""
        while self._ahead:
            self._restore(next(iter(self._ahead)))

    def _restore(self, sequence: Sequence) -> None:
        sequence.num_computed = self._ahead.pop(sequence)
        if sequence.token_ids[-1] < 0:
            sequence.token_ids.pop()
