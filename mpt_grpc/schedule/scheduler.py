"""Decides what each step computes and applies the results.

`plan` shares a step among the running sequences, and `commit` applies the chosen tokens; the next step may be planned
in between. The fair queue decides which sequence starts next. When blocks run short, the lowest-ranked running sequence
is preempted: its blocks are freed and it is recomputed later. The first sequence of a request is its primary; its
siblings start once the prompt is computed and share its full blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from mpt_grpc.errors import InvalidRequestError
from mpt_grpc.request import GenerationRequest
from mpt_grpc.results import Finish, FinishReason, TokenEvent, TokenLogprob
from mpt_grpc.schedule.block_pool import BlockPool
from mpt_grpc.schedule.block_tables import BlockTables
from mpt_grpc.schedule.drafts import Drafters
from mpt_grpc.schedule.fair_queue import FairQueue
from mpt_grpc.schedule.in_flight import InFlight
from mpt_grpc.schedule.running import Running
from mpt_grpc.schedule.sequence import Sequence
from mpt_grpc.schedule.shares import shares
from mpt_grpc.schedule.step_budget import StepBudget
from mpt_grpc.step import Matcher, SequenceStep, StepPlan, StepResult


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits on the sequences in a batch, the tokens in a step and the tokens of a sequence.

    `max_step_tokens` is at least `max_running_requests`, so that every running sequence gets a token in each step.
    """

    max_running_requests: int
    max_step_tokens: int
    max_context_tokens: int
    prefill_slowdown: float = math.inf
    """How many times as long a step may take for prompts beside running outputs as one with a token for each sequence.
    """
    speculates: bool = False
    """Whether drafts of the next tokens are computed where they pay."""


class Scheduler:
    """Schedules all waiting and running sequences. Not thread-safe: used by one thread only."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, eos_token_ids: frozenset[int]) -> None:
        assert limits.max_step_tokens >= limits.max_running_requests
        assert limits.max_context_tokens <= pool.num_blocks * pool.block_size, (
            "one full-length request must fit in the cache"
        )
        self._limits, self._pool, self._eos_token_ids = limits, pool, eos_token_ids
        self._blocks = BlockTables(pool)
        self._running = Running(limits.max_running_requests)
        self._waiting = FairQueue()
        self._in_flight = InFlight()
        self._sequences: dict[int, Sequence] = {}
        self._num_arrivals = 0
        self._budget = StepBudget(limits.max_step_tokens, limits.max_running_requests, limits.prefill_slowdown)
        self._started: list[int] = []
        """The sequences that run for the first time in the step that is being planned."""
        self._preempted: list[str] = []
        self._resumed: list[str] = []
        """The requests of the sequences that this step preempts, and that run again."""
        self._drafters = Drafters()

    @property
    def num_running(self) -> int:
        return len(self._running.sequences)

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - self.num_running

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def cached_blocks(self) -> tuple[int, ...]:
        return self._pool.cached

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(
        self,
        request: GenerationRequest,
        prompt_token_ids: tuple[int, ...],
        matchers: tuple[Matcher, ...] = (),
        *,
        complete: Collection[int] = (),
    ) -> list[tuple[Sequence, Finish | None]]:
        """Adds a prepared request: its seed and `max_new_tokens` are set, and its prompt fits in the context.

        With a constraint, `matchers` has one matcher per sequence, which knows the resumed tokens, and `complete` has
        the indices of the outputs that these complete. Returns the request's sequences, each with a finish if the
        resumed output had already ended, in which case the sequence is not scheduled.
        """
        primary: Sequence | None = None
        added: list[tuple[Sequence, Finish | None]] = []
        for number, (index, resumed) in enumerate(request.outputs.items()):
            sequence = Sequence(
                self._num_arrivals,
                request,
                index,
                prompt_token_ids,
                self._limits.max_context_tokens,
                self._eos_token_ids,
                matchers[number] if matchers else None,
                primary,
            )
            self._num_arrivals += 1
            finish = sequence.resume(resumed, is_complete=index in complete) if resumed else None
            assert 0 < len(sequence.token_ids) <= self._limits.max_context_tokens
            if finish is None:
                self._sequences[sequence.sequence_id] = sequence
                if primary is None:
                    self._waiting.add(sequence)
                else:
                    primary.siblings.append(sequence)
                primary = primary or sequence
            added.append((sequence, finish))
        return added

    def end(self, sequence: Sequence) -> bool:
        """Removes a sequence and frees its blocks immediately; returns False if it has already been removed."""
        if self._sequences.pop(sequence.sequence_id, None) is None:
            return False
        self._waiting.end(sequence)
        self._running.remove(sequence)
        if sequence.primary is not None and sequence in sequence.primary.siblings:
            sequence.primary.siblings.remove(sequence)
        self._blocks.release(sequence)
        self._drafters.forget(sequence)
        self._release_siblings(sequence)
        return True

    def plan(self) -> StepPlan:
        """Returns the plan of the next step, which is empty only if there is no work, or all of it is in flight.

        A step may be in flight, unless its plan needs the host.
        """
        self._in_flight.look_ahead(self._sequences)
        budget = self._budget.num_tokens(self._running.sequences, has_waiting=bool(self._waiting))
        self._start_waiting(budget)
        steps = self._steps(max(budget, self.num_running))
        if self._limits.speculates:
            self._add_drafts(steps)
        plan = StepPlan(tuple(steps), tuple(self._started), tuple(self._preempted), tuple(self._resumed))
        self._started, self._preempted, self._resumed = [], [], []
        self._in_flight.look_back()
        self._in_flight.add(plan)
        return plan

    def recover(self, plan: StepPlan) -> StepPlan:
        """Returns the plan of what remains to be computed of a step that has failed, with all tokens known.

        A step behind it is forgotten; what that one started or preempted remains so.
        """
        if (next_ := self._in_flight.forget_next(plan)) is not None:
            self._started, self._preempted, self._resumed = [*next_.started], [*next_.preempted], [*next_.resumed]
        return self._in_flight.remaining(plan, self._sequences)

    def shrink_steps(self) -> None:
        """Makes the next steps smaller, because one did not fit in memory."""
        self._budget.shrink()

    def commit(
        self, plan: StepPlan, result: StepResult, seconds: float | None = None
    ) -> list[tuple[Sequence, TokenEvent]]:
        """Applies the result of `plan`, in its order; returns an event for each token and each sequence that ended.

        Sequences that have ended or were preempted since are skipped. `seconds` is how long it took, unless it failed.
        """
        self._budget.record(plan.num_tokens, seconds)
        lost = self._in_flight.remove(plan)
        events = []
        for step in plan.sequences:
            sequence_id = step.sequence_id
            sequence = self._sequences.get(sequence_id)
            if sequence is None or sequence_id in lost:
                continue
            if result.errors and (error := result.errors.get(sequence_id)) is not None:
                self.end(sequence)
                events.append((sequence, TokenEvent(sequence.index, error=error)))
                continue
            token_ids = result.token_ids.get(sequence_id, ())
            is_deferred = not token_ids and bool(step.choices)
            if scored := result.prompt_logprobs.get(sequence_id):
                sequence.prompt_logprobs += scored
            self._blocks.advance(sequence, step.start + step.num_known - is_deferred)
            logprobs = result.logprobs.get(sequence_id, ())
            for index, token_id in enumerate(token_ids):
                if index:  # the token before it was a draft
                    self._blocks.advance(sequence, sequence.num_computed + 1)
                event = self._advance(sequence, token_id, logprobs[index] if logprobs else None)
                events.append((sequence, event))
                if event.finish is not None or event.error is not None:
                    break
            if not token_ids and not sequence.num_uncomputed and not sequence.wants_token:
                self.end(sequence)
                finish = Finish(FinishReason.MAX_NEW_TOKENS)
                event = TokenEvent(sequence.index, prompt_logprobs=tuple(sequence.prompt_logprobs), finish=finish)
                events.append((sequence, event))
        return events

    def _advance(self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None) -> TokenEvent:
        if sequence.siblings:
            self._release_siblings(sequence)
        try:
            finish = sequence.append(token_id)
        except InvalidRequestError as error:  # the constraint is too expensive
            self.end(sequence)
            return TokenEvent(sequence.index, error=error)
        if finish is not None:
            self.end(sequence)
        scored = sequence.prompt_logprobs
        prompt_logprobs = tuple(scored) if scored and sequence.is_at_first_token else ()
        return TokenEvent(sequence.index, token_id, logprob, prompt_logprobs, finish)

    def _release_siblings(self, primary: Sequence) -> None:
        while primary.siblings:
            self._waiting.add(primary.siblings.pop())

    def _start_waiting(self, budget: int) -> None:
        """Starts waiting sequences, strictly in their order, while budget, slots and blocks for their tokens last.

        A sequence preempts those that must make way for it if it fits once they are gone. Until the others leave it a
        token of the budget, it owns no blocks: more of its prompt may be in the prefix cache then.
        """
        while self._waiting and self._running.leaves_token_for(head := self._waiting.first, budget):
            hits = self._blocks.cached(head)
            if self._lacks_capacity_for(head, hits):
                preemptible = self._running.preemptible_for(head, self._waiting)
                staying = [s for s in self._running.sequences if s not in preemptible]
                if not preemptible or not self._blocks.would_have_room(staying, head, hits):
                    return
                while self._lacks_capacity_for(head, hits):
                    self._preempt(preemptible.pop(0))
            self._waiting.start(head)
            if head.num_cached_tokens is None:
                self._started.append(head.sequence_id)
            else:
                self._resumed.append(head.request.request_id)
            self._blocks.start(head, hits)
            self._running.add(head)

    def _lacks_capacity_for(self, head: Sequence, hits: list[int]) -> bool:
        """Whether the batch has no free slot, or too few blocks are free for the running sequences and `head`."""
        return self._running.is_full or not self._blocks.has_room(self._running.sequences, head, hits)

    def _steps(self, budget: int) -> list[SequenceStep]:
        """Shares the budget among the running sequences.

        A sequence for which no block is left is preempted, after all that rank lower.
        """
        steps: list[SequenceStep] = []
        running, block_size = self._running.sequences, self._pool.block_size
        num_tokens = shares(running, budget)
        for sequence in running:  # only later ones are preempted meanwhile
            if not (count := num_tokens[sequence]):  # its last token is in flight
                continue
            end = sequence.num_computed + count
            if end <= len(sequence.block_table) * block_size or self._extend(sequence, end):
                steps.append(sequence.step(count))
        return steps

    def _add_drafts(self, steps: list[SequenceStep]) -> None:
        """Adds drafts to the steps of running sequences where that pays, while budget and free blocks last."""
        for place, drafts in self._drafters.draft(self._running.sequences, steps, self._budget).items():
            sequence, step = self._running.sequences[place], steps[place]
            if self._blocks.extend(sequence, step.length + len(drafts)):
                steps[place] = sequence.step(len(step.token_ids), drafts)

    def _extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Allocates blocks for the first `num_tokens` tokens, for which others of no higher rank are preempted.

        Returns False if the sequence itself had to be preempted.
        """
        while not self._blocks.extend(sequence, num_tokens):
            last = self._running.sequences[-1]
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._in_flight.lose(sequence)
        self._running.remove(sequence)
        self._blocks.release(sequence)
        sequence.num_preemptions += 1
        self._preempted.append(sequence.request.request_id)
        self._waiting.add(sequence)
