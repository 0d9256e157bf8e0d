"""The results of requests as frozen values, with the names of the API (`protos/mpt/v1`)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from mpt_grpc.conversation import ToolCall


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of a token under the model's own distribution, before penalties, biases, constraints and
    temperature."""

    token_id: int
    logprob: float
    """The natural logarithm of the probability."""
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log probabilities, in decreasing order."""


class FinishReason(enum.Enum):
    """The reason an output ended."""

    MAX_NEW_TOKENS = enum.auto()
    EOS_TOKEN = enum.auto()
    STOP_STRING = enum.auto()
    STOP_TOKEN = enum.auto()
    CONTEXT_LENGTH = enum.auto()
    CANCELLED = enum.auto()
    TIME_LIMIT = enum.auto()
    REPETITION = enum.auto()
    CONTENT_FILTER = enum.auto()
    TOOL_CALLS = enum.auto()


@dataclass(frozen=True)
class Finish:
    """Why an output ended, and the token or string that ended it, if there is one."""

    reason: FinishReason
    stop_token_id: int | None = None
    stop_string: str | None = None


class TokenEvent(NamedTuple):
    """A token that a step gave one sequence of a request, or its end.

    Every sequence ends with one `finish`, the last of which has `stats`, or the request ends with one `error`.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    """The index of the sequence."""
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    """The log probability of the token, if requested."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """The log probabilities of the prompt from its second token, if requested; with the first token, or the finish if
    there is none."""
    finish: Finish | None = None
    error: Exception | None = None
    stats: RequestStats | None = None
    """Set with the last `finish`, and with the `error` of a step."""


@dataclass(frozen=True)
class RequestStats:
    """Statistics of a request. Times are in seconds since the epoch, and None for phases that it has not reached."""

    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens taken from the prefix cache when the request first ran."""
    num_preemptions: int
    seed: int
    """The seed of the first output."""
    arrival_time_s: float
    scheduled_time_s: float | None
    first_token_time_s: float | None
    end_time_s: float
    """The present time while the request is in progress."""
    num_output_tokens: int
    """The number of tokens of all outputs together, without resumed ones; in a result, those that the reader got."""
    finishes: tuple[Finish, ...] = ()
    """Why the outputs ended, in the order of their indices; in a result only."""


class OutputDelta(NamedTuple):
    """The new part of one output that may be sent now; the first has `prompt_logprobs` and the last of all outputs has
    `stats`."""

    index: int  # type: ignore[assignment]  # hides tuple.index
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    stats: RequestStats | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Output:
    """A complete output."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: Finish
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Generation:
    """The outputs of a request, with its statistics."""

    outputs: tuple[Output, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    stats: RequestStats

    @property
    def text(self) -> str:
        """The text of the first output."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token IDs of the first output."""
        return self.outputs[0].token_ids

    @property
    def finish(self) -> Finish:
        """Why the first output ended."""
        return self.outputs[0].finish
