"""What the engine shows of itself to those who watch: values, taken between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from mpt_grpc.request import FinishReason, RequestStats


@dataclass(frozen=True)
class SequenceState:
    """One output of a request; it runs if it holds blocks."""

    index: int
    num_computed_tokens: int
    num_output_tokens: int
    blocks: tuple[int, ...]
    """Of the KV cache, in the order of the tokens; other sequences may share the first ones."""
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class RequestState:
    """One request, in flight or ended; one that ended with an error has sequences without a finish reason."""

    request_id: str
    stats: RequestStats
    num_output_tokens: int
    """Those of all sequences together, without any that were resumed."""
    sequences: tuple[SequenceState, ...]
    """Empty until the scheduler has it."""


@dataclass(frozen=True)
class EngineLoad:
    """How busy the engine was after its last step; counters run since the start."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_steps: int = 0
    num_generated_tokens: int = 0
    num_batched_sequences: int = 0


@dataclass(frozen=True)
class EngineState:
    """The engine at `time_s`, in seconds since the epoch."""

    time_s: float
    load: EngineLoad
    kept_blocks: tuple[int, ...]
    """Blocks that no sequence holds and whose content can be found again."""
    in_flight: tuple[RequestState, ...]
    """By arrival."""
    ended: tuple[RequestState, ...]
    """The last ones, by their end."""
