"""Snapshots of the engine's state, taken between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from mpt_grpc.results import FinishReason, RequestStats


@dataclass(frozen=True)
class SequenceState:
    """One output of a request. It is running if it has blocks."""

    index: int
    num_computed_tokens: int
    num_output_tokens: int
    blocks: tuple[int, ...]
    """The sequence's blocks of the KV cache, in token order; other sequences may share the first ones."""
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class RequestState:
    """One request, in flight or ended. After an error, some of its sequences have no finish reason."""

    request_id: str
    stats: RequestStats
    sequences: tuple[SequenceState, ...]
    """Empty until the request is added to the scheduler."""


@dataclass(frozen=True)
class EngineLoad:
    """The engine's load after its last step. Counters start at zero when the engine starts."""

    num_running: int = 0
    num_waiting: int = 0
    num_preparing: int = 0
    num_free_blocks: int = 0
    num_steps: int = 0
    num_generated_tokens: int = 0
    num_batched_sequences: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True)
class EngineState:
    """The state of the engine at `time_s`, in seconds since the epoch."""

    time_s: float
    load: EngineLoad
    cached_blocks: tuple[int, ...]
    """Blocks that no sequence uses but that the prefix cache can still find."""
    in_flight: tuple[RequestState, ...]
    """The requests in flight, in order of arrival."""
    ended: tuple[RequestState, ...]
    """The most recently ended requests, in the order in which they ended."""
