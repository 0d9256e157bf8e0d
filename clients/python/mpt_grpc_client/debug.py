"""The state of the engine, as returned by `Client.get_engine_state`. It may change in any release."""

from __future__ import annotations

from dataclasses import dataclass

from mpt_grpc_client import responses
from mpt_grpc_client.proto.v1alpha1 import debug_pb2
from mpt_grpc_client.results import FinishReason, Timings, Usage
from mpt_grpc_client.server_info import Load

_PARTS_OF_REQUEST = 32


@dataclass(frozen=True)
class SequenceState:
    """The state of one output."""

    index: int
    num_computed_tokens: int
    """The number of prompt and output tokens whose keys and values are in the cache."""
    num_output_tokens: int
    blocks: tuple[int, ...]
    """The KV cache blocks of the sequence; empty while it is waiting and after it has ended."""
    finish_reason: FinishReason | None
    """Why the engine ended the output: CANCELLED also for stop strings and guards, which are found outside the engine.
    None while the output is in progress, and after an error."""


@dataclass(frozen=True)
class RequestState:
    """The state of a request."""

    request_id: str
    arrival_time: float
    """In seconds since the epoch."""
    end_time: float | None
    """In seconds since the epoch; None while the request is in progress."""
    timings: Timings
    usage: Usage
    sequences: tuple[SequenceState, ...]


@dataclass(frozen=True)
class EngineState:
    """The state of the engine between two steps."""

    time: float
    """When the state was captured, in seconds since the epoch by the server's clock."""
    load: Load
    cached_blocks: tuple[int, ...]
    """The KV cache blocks that no request uses and the prefix cache retains."""
    active_requests: tuple[RequestState, ...]
    """The requests in progress, in order of arrival."""
    completed_requests: tuple[RequestState, ...]
    """The last 64 completed requests, in order of completion."""


def engine_state(response: debug_pb2.GetEngineStateResponse) -> EngineState:
    return EngineState(
        time=response.time.ToNanoseconds() / 1e9,
        load=responses.load(response.load),
        cached_blocks=tuple(response.cached_blocks),
        active_requests=tuple(map(_request_state, response.active_requests)),
        completed_requests=tuple(map(_request_state, response.completed_requests)),
    )


def num_parts(response: debug_pb2.GetEngineStateResponse) -> int:
    """Returns the number of values in the state; each request has some dozens."""
    num_requests = len(response.active_requests) + len(response.completed_requests)
    return len(response.cached_blocks) + _PARTS_OF_REQUEST * num_requests


def _request_state(state: debug_pb2.RequestState) -> RequestState:
    return RequestState(
        request_id=state.request_id,
        arrival_time=state.arrival_time.ToNanoseconds() / 1e9,
        end_time=state.end_time.ToNanoseconds() / 1e9 if state.HasField("end_time") else None,
        timings=responses.timings(state.timings),
        usage=responses.usage(state.usage),
        sequences=tuple(map(_sequence_state, state.sequences)),
    )


def _sequence_state(state: debug_pb2.SequenceState) -> SequenceState:
    return SequenceState(
        index=state.index,
        num_computed_tokens=state.num_computed_tokens,
        num_output_tokens=state.num_output_tokens,
        blocks=tuple(state.blocks),
        finish_reason=FinishReason(state.finish_reason) if state.HasField("finish_reason") else None,
    )
