"""The frozen values that the control plane (`schedule/`) and the data plane (`model/`) exchange in one step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from mpt_grpc.request import DecodingOptions, SamplingParameters
from mpt_grpc.results import TokenLogprob


class Matcher(Protocol):
    """The state of one output's constraint. Its methods raise InvalidRequestError if the constraint costs too much."""

    def advance(self, token_id: int) -> bool:
        """Consumes a chosen token; returns whether the output is complete, so that no token may follow."""
        ...

    def masks(self, drafts: Sequence[int]) -> list[bytes]:
        """Returns bit masks of the tokens that may come next: token i is allowed if bit i % 8 of byte i // 8 is set.

        The first is for the next token, the others for the tokens after each draft, while the drafts are allowed. It
        may be called from another thread, without blocking this one, but not while `advance` runs.
        """
        ...


@dataclass(frozen=True)
class SamplingInputs:
    """How a sequence's next token is chosen.

    It is the same object from step to step, unless there are penalties or `min_new_tokens` is not reached.
    """

    parameters: SamplingParameters
    """The sampling parameters; the seed is always set, and is the sequence's own."""
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    prompt_token_ids: tuple[int, ...] = ()
    """The prompt's tokens if there is a repetition penalty, else empty."""
    output_token_ids: tuple[int, ...] = ()
    """The output's tokens if there is a penalty of any kind, else empty."""
    forbidden_token_ids: tuple[int, ...] = ()
    """End-of-sequence and stop tokens until `min_new_tokens` is reached, else empty."""
    matcher: Matcher | None = None
    num_top_logprobs: int | None = None
    """The number of most likely tokens to report; None if no TokenLogprob was requested."""

    @property
    def needs_host(self) -> bool:
        """Whether the host has to know the token before it can plan the next one, or computes more from it."""
        return self.matcher is not None or self.num_top_logprobs is not None or self.decoding.penalizes


@dataclass(frozen=True)
class PromptScoring:
    """Prompt tokens whose log probabilities were requested: `token_ids[i]` follows the step's token `first + i`."""

    first: int
    token_ids: tuple[int, ...]
    num_top_logprobs: int


class SequenceStep(NamedTuple):
    """One sequence's part of a step: compute the tokens at positions [start, start + len(token_ids))."""

    sequence_id: int
    """Unique among all sequences of the process; never reused."""
    request_id: str
    token_ids: tuple[int, ...]
    """Known tokens, and after the last known one the drafts. A pending token, which is the last one then, is ~i: the
    i-th choice of the step before, which is not known on the host yet."""
    start: int
    block_table: tuple[int, ...]
    """The blocks that store positions [0, start + len(token_ids)), in order; the same object until a block is added."""
    choices: tuple[SamplingInputs, ...]
    """How the tokens after the last known one and after each draft are chosen; empty if none is to be chosen."""
    output_position: int = 0
    """The number of output tokens chosen so far; it is the counter of the sampler's hash."""
    scoring: PromptScoring | None = None

    @property
    def num_known(self) -> int:
        """The number of the step's tokens that are known."""
        return len(self.token_ids) - max(0, len(self.choices) - 1)

    @property
    def drafts(self) -> tuple[int, ...]:
        """Guesses of the next tokens: the sequence gets as many as the model chooses, and the one after these."""
        return self.token_ids[self.num_known :]

    @property
    def length(self) -> int:
        """The number of the sequence's tokens in the cache after the step, drafts included."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class StepPlan:
    """What the model computes in one step; each sequence appears at most once."""

    sequences: tuple[SequenceStep, ...]
    started: tuple[int, ...] = ()
    """The IDs of the sequences that run for the first time."""
    preempted: tuple[str, ...] = ()
    """The request ID of each sequence that was preempted for this step."""
    resumed: tuple[str, ...] = ()
    """The request ID of each sequence that runs again after it was preempted."""

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def num_drafts(self) -> int:
        return sum(len(sequence.choices) - 1 for sequence in self.sequences if sequence.choices)

    @property
    def needs_host(self) -> bool:
        """Whether the next step can be planned only once this one's results are known on the host."""
        return any(
            step.scoring is not None or len(step.choices) > 1 or (step.choices and step.choices[0].needs_host)
            for step in self.sequences
        )


@dataclass(frozen=True)
class StepResult:
    """The results of a step, by sequence ID."""

    token_ids: Mapping[int, tuple[int, ...]]
    """The chosen tokens: the drafts that were right, and the token after them."""
    logprobs: Mapping[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    """Log probabilities of the chosen tokens, where requested."""
    prompt_logprobs: Mapping[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    """Log probabilities of the tokens in each `PromptScoring`, in the same order."""
    errors: Mapping[int, Exception] = field(default_factory=dict)
    """Errors of sequences that failed while the rest of the step succeeded."""

    def is_deferred(self, sequence: SequenceStep) -> bool:
        """Whether a sequence was to get a token but was not ready; its last token is then computed again."""
        has_result = sequence.sequence_id in self.token_ids or sequence.sequence_id in self.errors
        return bool(sequence.choices) and not has_result


def merged(results: Iterable[StepResult]) -> StepResult:
    """Returns the union of results that concern different sequences."""
    results = tuple(results)
    return StepResult(
        token_ids={key: value for result in results for key, value in result.token_ids.items()},
        logprobs={key: value for result in results for key, value in result.logprobs.items()},
        prompt_logprobs={key: value for result in results for key, value in result.prompt_logprobs.items()},
        errors={key: value for result in results for key, value in result.errors.items()},
    )
