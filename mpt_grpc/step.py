"""What passes between the control plane (`schedule/`) and the data plane (`model/`) in one step, as frozen values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mpt_grpc.request import DecodingOptions, SamplingParameters, TokenLogprob


class Matcher(Protocol):
    """A constraint, and how far one output has come in it. Raises InvalidRequestError once it costs too much."""

    def advance(self, token_id: int) -> bool:
        """Takes a chosen token in; returns whether the output is complete, so that nothing may follow."""
        ...

    def mask(self) -> bytes:
        """Which tokens may come next: token i may if bit i % 8 of byte i // 8 is set.

        Another thread may call it, which then does not hold up this one, but not while `advance` runs.
        """
        ...


@dataclass(frozen=True)
class TokenChoice:
    """How a sequence's next token is chosen: everything that the sampler needs, so that it keeps no state."""

    sampling: SamplingParameters
    """With the seed of the sequence, always."""
    output_position: int
    """How many tokens were chosen before; the sampler's counter."""
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    prompt_token_ids: tuple[int, ...] = ()
    """With a repetition penalty, else empty."""
    output_token_ids: tuple[int, ...] = ()
    """With a penalty of any kind, else empty."""
    forbidden_token_ids: tuple[int, ...] = ()
    """End marks and stop tokens, as long as `min_new_tokens` is not reached."""
    matcher: Matcher | None = None
    num_top_logprobs: int | None = None
    """None if no TokenLogprob is asked for."""


@dataclass(frozen=True)
class PromptScoring:
    """Prompt tokens whose log probability is asked for: `token_ids[i]` follows the step's token `first + i`."""

    first: int
    token_ids: tuple[int, ...]
    num_top_logprobs: int


@dataclass(frozen=True)
class SequenceStep:
    """One sequence's share of a step: compute the tokens at positions [start, start + len(token_ids))."""

    sequence_id: int
    """No other sequence ever has it."""
    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    """The blocks that hold positions [0, start + len(token_ids)), in order."""
    choice: TokenChoice | None
    """If these are the last known tokens and a new one is chosen after them."""
    scoring: PromptScoring | None = None

    @property
    def length(self) -> int:
        """Tokens in the cache once the step is done."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class StepPlan:
    """What the model computes in one step; no sequence is named twice."""

    sequences: tuple[SequenceStep, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


@dataclass(frozen=True)
class StepResult:
    """What came of a step, by sequence id."""

    token_ids: Mapping[int, int]
    """The chosen tokens."""
    logprobs: Mapping[int, TokenLogprob] = field(default_factory=dict)
    """Of the chosen tokens, where asked for."""
    prompt_logprobs: Mapping[int, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    """Of the prompt tokens of `PromptScoring`, in their order."""
    errors: Mapping[int, Exception] = field(default_factory=dict)
    """The sequences that failed alone."""

    def is_late(self, sequence: SequenceStep) -> bool:
        """Whether a sequence wanted a token and was not ready to choose: its last token is computed again."""
        known = sequence.sequence_id in self.token_ids or sequence.sequence_id in self.errors
        return sequence.choice is not None and not known


def merged(results: Iterable[StepResult]) -> StepResult:
    """One result of several, which name different sequences."""
    results = tuple(results)
    return StepResult(
        token_ids={key: value for result in results for key, value in result.token_ids.items()},
        logprobs={key: value for result in results for key, value in result.logprobs.items()},
        prompt_logprobs={key: value for result in results for key, value in result.prompt_logprobs.items()},
        errors={key: value for result in results for key, value in result.errors.items()},
    )
