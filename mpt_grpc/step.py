"""What passes between the control plane (`schedule/`) and the data plane (`model/`) in one step, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mpt_grpc.request import SamplingParameters


@dataclass(frozen=True)
class SequenceStep:
    """One sequence's share of a step: compute the tokens at positions [start, start + len(token_ids))."""

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    """The blocks that hold positions [0, start + len(token_ids)), in order."""
    samples: bool
    """Whether these are the last known tokens, so that a new one is chosen after them."""
    sampling: SamplingParameters
    """With a seed, always."""
    output_position: int
    """How many tokens were chosen before the one that is chosen now; the sampler's counter."""

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
    """What came of a step: the chosen token of each sequence that samples, and the sequences that failed alone."""

    token_ids: Mapping[str, int]
    errors: Mapping[str, Exception] = field(default_factory=dict)
