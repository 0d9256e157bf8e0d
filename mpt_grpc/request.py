"""What a caller asks and what comes back, as frozen values; their fields are named as in the API (`protos/mpt/v1`)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParameters:
    """How a token is chosen. The filters apply in the order temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach this sum; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest; 0 keeps all."""
    seed: int | None = None
    """Uint64; None lets the engine draw one."""


@dataclass(frozen=True)
class StoppingCriteria:
    """When an output ends."""

    max_new_tokens: int | None = None
    """None takes the server's default, cut to what the context has room for."""
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_string: bool = False
    """Whether the text ends with the stop string that was met."""
    ignore_eos: bool = False


@dataclass(frozen=True)
class CacheOptions:
    """How the request uses the prefix cache."""

    bypass: bool = False
    """Neither read nor fill it."""
    salt: str = ""
    """Blocks are shared only among requests with the same salt."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue."""

    request_id: str
    prompt: str | tuple[int, ...]
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    stopping: StoppingCriteria = field(default_factory=StoppingCriteria)
    cache: CacheOptions = field(default_factory=CacheOptions)
    priority: int = 0
    """Higher goes first; among equals the earlier arrival."""
    skip_special_tokens: bool = True
    """Whether special tokens, such as the end mark, are left out of the text."""


class FinishReason(enum.Enum):
    """Why an output ended."""

    MAX_NEW_TOKENS = enum.auto()
    EOS_TOKEN = enum.auto()
    STOP_STRING = enum.auto()
    STOP_TOKEN = enum.auto()
    CONTEXT_LENGTH = enum.auto()
    CANCELLED = enum.auto()


@dataclass(frozen=True)
class Finish:
    """The end of an output: why, and the stop token or stop string that was met, if one was."""

    reason: FinishReason
    stop_token_id: int | None = None
    stop_string: str | None = None


@dataclass(frozen=True)
class TokenEvent:
    """What one step of the engine did for one request. A stream ends with exactly one `finish` or one `error`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish: Finish | None = None
    error: Exception | None = None
    stats: RequestStats | None = None
    """With `finish`, and with the `error` of a step."""


@dataclass(frozen=True)
class RequestStats:
    """The account of one ended request. Times are seconds since the epoch; None where it never got that far."""

    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens taken from the prefix cache when the request first ran."""
    num_preemptions: int
    seed: int
    """The seed that was used."""
    arrival_time_s: float
    scheduled_time_s: float | None
    first_token_time_s: float | None
    end_time_s: float


@dataclass(frozen=True)
class OutputDelta:
    """A piece of an output. The last one of a stream has `finish` and `stats`."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish | None = None
    stats: RequestStats | None = None


@dataclass(frozen=True)
class Output:
    """A whole output."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish
    stats: RequestStats
