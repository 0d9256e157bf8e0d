"""Runs the scheduler against a simulated model: a cache that records what was written to each entry, and a language
model whose next token is a hash of all tokens before it. A plan that reads a wrong, stale or unwritten entry fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from mpt_grpc.errors import InternalError
from mpt_grpc.request import CacheOptions, GenerationRequest, SamplingParameters, StoppingCriteria
from mpt_grpc.results import TokenEvent, TokenLogprob
from mpt_grpc.schedule.block_pool import BlockPool
from mpt_grpc.schedule.scheduler import Scheduler, SchedulerLimits
from mpt_grpc.schedule.sequence import Sequence as SchedulerSequence
from mpt_grpc.step import SequenceStep, StepPlan, StepResult

BLOCK_SIZE = 4
EOS = 0
NONSENSE = 60
"""A token that the simulated model never chooses."""


def next_token(tokens: Sequence[int], seed: int = 1) -> int:
    """Returns the token that the simulated model chooses; after prompts that begin with 3, its text runs in circles."""
    if tokens[0] == 3:
        tokens = tokens[-1:]
    return blake2b(repr([seed, *tokens]).encode(), digest_size=1).digest()[0] % 50


def expected_output(prompt: tuple[int, ...], max_new_tokens: int, max_context: int, seed: int = 1) -> list[int]:
    """Returns the output of a sequence that runs alone."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new_tokens and len(tokens) < max_context:
        tokens.append(next_token(tokens, seed))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def logprob_of(tokens: Sequence[int]) -> TokenLogprob:
    """Returns a fake log probability of the last token given the tokens before it."""
    return TokenLogprob(tokens[-1], -float(next_token(tokens)), rank=1)


def request(
    name: str, max_new_tokens: int = 8, priority: int = 0, *, num_sequences: int = 1, **cache: object
) -> GenerationRequest:
    return GenerationRequest(
        name,
        "",
        SamplingParameters(seed=1, num_sequences=num_sequences),
        stopping=StoppingCriteria(max_new_tokens=max_new_tokens),
        cache=CacheOptions(**cache),  # type: ignore[arg-type]
        priority=priority,
    )


class WatchedPool(BlockPool):
    def is_writable(self, block: int) -> bool:
        """Whether the block has at most one owner and is not in the prefix cache."""
        return self._owners[block] <= 1 and block not in self._digest_of


@dataclass
class Machine:
    """A scheduler and a simulated model that checks every plan.

    The first sequence of a request is named after the request; the names of the others have their index appended.
    """

    limits: SchedulerLimits
    num_blocks: int
    prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sharers: dict[str, str] = field(default_factory=dict)
    """The group of sequences that may read each other's cache entries: one per salt, or one per request if it bypasses
    the prefix cache."""
    outputs: dict[str, list[int]] = field(default_factory=dict)
    ended: dict[str, TokenEvent] = field(default_factory=dict)
    prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    num_computed: dict[str, int] = field(default_factory=dict)
    step_seconds: Callable[[int], float] = lambda num_tokens: 8.0 + num_tokens
    runs_ahead: bool = False
    """Whether a step is planned and computed before the one before it is committed, if that one's plan allows it."""

    def __post_init__(self) -> None:
        self.pool = WatchedPool(self.num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(self.limits, self.pool, frozenset({EOS}))
        self.cache: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
        self.names: dict[int, str] = {}
        self.sequences: dict[str, SchedulerSequence] = {}
        self.in_flight: tuple[StepPlan, StepResult | None] | None = None
        """The step that is not committed yet, and its result unless it has failed."""
        self._row_tokens: list[int] = []
        """The tokens of the choices of the last step."""

    def add(self, added: GenerationRequest, prompt: tuple[int, ...]) -> None:
        cache = added.cache
        for sequence, finish in self.scheduler.add(added, prompt):
            name = f"{added.request_id}{sequence.index or ''}"
            self.names[sequence.sequence_id], self.sequences[name] = name, sequence
            self.prompts[name], self.outputs[name] = prompt, list(added.resume_token_ids)
            self.sharers[name] = f"only {added.request_id}" if cache.bypass else f"salt {cache.salt}"
            if finish is not None:
                self.ended[name] = TokenEvent(sequence.index, finish=finish)

    def end(self, name: str) -> bool:
        return self.scheduler.end(self.sequences[name])

    def planned(self, plan: StepPlan) -> list[str]:
        return [self.names[s.sequence_id] for s in plan.sequences]

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert bool(plan.sequences) == self.scheduler.has_work or self.in_flight
        assert plan.num_tokens <= self.limits.max_step_tokens
        assert len(plan.sequences) <= self.limits.max_running_requests
        assert len({s.sequence_id for s in plan.sequences}) == len(plan.sequences)
        ending = set() if self.in_flight is None else {s.sequence_id for s in self.in_flight[0].sequences}
        left_out = self.scheduler.num_running - len(plan.sequences)
        assert 0 <= left_out <= len(ending - {s.sequence_id for s in plan.sequences}), "a running sequence was left out"
        written = [entry for s in plan.sequences for entry in self._cache_entries(s, s.start, s.length)]
        assert len(written) == len(set(written)), "two sequences write the same cache entry"
        return plan

    def run(
        self,
        plan: StepPlan,
        failing: frozenset[str] = frozenset(),
        deferred: frozenset[str] = frozenset(),
        *,
        fails: bool = False,
    ) -> dict[str, TokenEvent]:
        """Computes a plan and returns the events of the steps that are committed then.

        Sequences may be `failing` alone; if all of the step `fails`, what remains of it is computed again.
        """
        previous = self.in_flight
        self.in_flight = (plan, self._compute(plan, failing, deferred, fails=fails)) if plan.sequences else None
        events = {} if previous is None else self._commit(*previous)
        if self.in_flight is not None and (not self.runs_ahead or plan.needs_host or deferred):
            (last, result), self.in_flight = self.in_flight, None
            events |= self._commit(last, result)
        return events

    def _compute(
        self, plan: StepPlan, failing: frozenset[str], deferred: frozenset[str], *, fails: bool
    ) -> StepResult | None:
        """Returns the result of a step, or None if it fails; it has written nonsense then."""
        is_void = self.in_flight is not None and self.in_flight[1] is None
        previous, self._row_tokens = self._row_tokens, list[int]()
        chosen: dict[int, tuple[int, ...]] = {}
        logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        scored = {}
        for s in plan.sequences:
            name = self.names[s.sequence_id]
            known = (*self.prompts[name], *self.outputs[name])
            if s.token_ids[-1] < 0:
                known += (previous[~s.token_ids[-1]],)
                s = s._replace(token_ids=(*s.token_ids[:-1], known[-1]))
            sharers = self.sharers[name]
            end = s.start + s.num_known
            num_output_tokens = len(known) - len(self.prompts[name])
            assert s.token_ids == known[s.start : end] + s.drafts
            max_new_tokens = self.sequences[name].request.stopping.max_new_tokens or 0
            wants_token = num_output_tokens != max_new_tokens
            assert bool(s.choices) == (end == len(known) and wants_token)
            if s.drafts:
                assert len(s.choices) == 1 + len(s.drafts)
                assert num_output_tokens + len(s.choices) <= max_new_tokens
                assert s.length + 1 <= self.limits.max_context_tokens
            assert len(s.block_table) >= -(-s.length // BLOCK_SIZE)
            assert len(s.block_table) == -(-s.length // BLOCK_SIZE) or self.limits.speculates or self.runs_ahead
            for block in s.block_table[s.start // BLOCK_SIZE : -(-s.length // BLOCK_SIZE)]:
                assert self.pool.is_writable(block), "writes to what others may read"
            if fails or is_void:
                self.cache |= dict.fromkeys(self._cache_entries(s, s.start, s.length), ("nobody", ()))
                self._row_tokens += [NONSENSE] * len(s.choices)
                continue
            known += s.drafts
            for position, entry in enumerate(self._cache_entries(s, 0, s.start)):
                assert self.cache[entry] == (sharers, known[: position + 1]), "reads what another sequence wrote"
            for position, entry in enumerate(self._cache_entries(s, s.start, s.length), s.start):
                self.cache[entry] = (sharers, known[: position + 1])
            self.num_computed[name] = self.num_computed.get(name, 0) + len(s.token_ids)
            if s.choices:
                assert s.output_position == num_output_tokens
                if name not in deferred:
                    chosen[s.sequence_id] = self._chosen(s, known[:end])
                    ends = range(end + 1, end + 1 + len(chosen[s.sequence_id]))
                    accepted = known[:end] + chosen[s.sequence_id]
                    logprobs[s.sequence_id] = tuple(logprob_of(accepted[:stop]) for stop in ends)
                    self._row_tokens.append(chosen[s.sequence_id][0])
            if s.scoring is not None:
                first = s.start + s.scoring.first
                assert s.scoring.token_ids == known[first + 1 : first + 1 + len(s.scoring.token_ids)]
                ends = range(first + 2, first + 2 + len(s.scoring.token_ids))
                assert ends[-1] <= min(s.length + 1, len(self.prompts[name])), (
                    "the logits that it needs are not computed"
                )
                scored[s.sequence_id] = tuple(logprob_of(known[:end]) for end in ends)
        errors = {s.sequence_id: InternalError("fault") for s in plan.sequences if self.names[s.sequence_id] in failing}
        return None if fails or is_void else StepResult(chosen, logprobs, scored, errors)

    def _commit(self, plan: StepPlan, result: StepResult | None) -> dict[str, TokenEvent]:
        if result is None:
            self.in_flight = None
            remaining = self.scheduler.recover(plan)
            result = self._compute(remaining, frozenset(), frozenset(), fails=False)
            assert result is not None
        committed = self.scheduler.commit(plan, result, self.step_seconds(plan.num_tokens))
        named = [(self.names[sequence.sequence_id], event) for sequence, event in committed]
        events = dict(named)
        assert len(events) == len(committed) or self.limits.speculates
        for name, event in named:
            assert name not in self.ended
            assert event.index == self.sequences[name].index
            if event.prompt_logprobs:
                assert name not in self.prompt_logprobs, "returned twice"
                self.prompt_logprobs[name] = event.prompt_logprobs
            if event.token_id is not None:
                self.outputs[name].append(event.token_id)
                assert event.logprob == logprob_of((*self.prompts[name], *self.outputs[name]))
            if event.finish is not None or event.error is not None:
                self.ended[name] = event
        return events

    def step(self) -> StepPlan:
        plan = self.plan()
        self.run(plan)
        return plan

    def finish(self) -> None:
        """Steps until all sequences have ended; each step computes at least one token, so the number is bounded."""
        for _ in range(5000):
            if not self.scheduler.has_work and self.in_flight is None:
                break
            self.step()
        assert not self.scheduler.has_work
        assert self.scheduler.num_free_blocks == self.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0

    @staticmethod
    def _chosen(s: SequenceStep, known: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the drafts that are right and the token after them."""
        seed = s.choices[0].parameters.seed or 0
        chosen: tuple[int, ...] = ()
        for draft in (*s.drafts, None):
            chosen += (next_token(known + chosen, seed),)
            if chosen[-1] != draft:
                break
        return chosen

    @staticmethod
    def _cache_entries(s: SequenceStep, start: int, end: int) -> list[tuple[int, int]]:
        return [(s.block_table[p // BLOCK_SIZE], p % BLOCK_SIZE) for p in range(start, end)]


def machine(
    num_blocks: int = 64,
    max_running: int = 8,
    max_step_tokens: int = 32,
    max_context: int = 100,
    prefill_slowdown: float = math.inf,
    speculates: bool = False,
    runs_ahead: bool = False,
) -> Machine:
    context = min(max_context, num_blocks * BLOCK_SIZE)
    limits = SchedulerLimits(max_running, max_step_tokens, context, prefill_slowdown, speculates=speculates)
    return Machine(limits, num_blocks, runs_ahead=runs_ahead)
