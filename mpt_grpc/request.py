"""What a caller asks and what comes back, as frozen values; their fields are named as in the API (`protos/mpt/v1`)."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """'system', 'user' or 'assistant'."""
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages that the model's chat template makes a prompt of; the last is the user's."""

    messages: tuple[Message, ...]
    drop_oldest_turns: bool = False
    """Whether the oldest turns are left out where all of them do not fit the context; the system message stays."""


@dataclass(frozen=True)
class SamplingParameters:
    """How a token is drawn. The filters apply in the order temperature, top-k, top-p, min-p, typical-p."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose probabilities reach this sum; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest; 0 keeps all."""
    typical_p: float = 1.0
    """Keep the fewest tokens closest to the expected surprise whose probabilities reach this sum; 1 keeps all."""
    seed: int | None = None
    """Uint64; None lets the engine draw one."""
    num_sequences: int = 1
    """How many outputs; each draws with a seed of its own, see `sequence_seed`."""


@dataclass(frozen=True)
class GenerationDefaults:
    """The values used for options that a request does not set."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    """Reduced to the room in the context."""


@dataclass(frozen=True)
class JsonSchema:
    """The output is JSON that a schema allows."""

    schema: str
    """As JSON."""


@dataclass(frozen=True)
class JsonObject:
    """The output is any JSON object."""


@dataclass(frozen=True)
class Regex:
    """The whole output matches a regular expression."""

    pattern: str


@dataclass(frozen=True)
class Choice:
    """The output is one of these strings."""

    options: tuple[str, ...]


@dataclass(frozen=True)
class LarkGrammar:
    """The output is a sentence of a grammar in llguidance's variant of Lark."""

    grammar: str


Constraint = JsonSchema | JsonObject | Regex | Choice | LarkGrammar


@dataclass(frozen=True)
class DecodingOptions:
    """What is done to the scores before a token is drawn, in this order; it applies to greedy choices too."""

    repetition_penalty: float = 1.0
    """Divides the positive scores of tokens in prompt and output, and multiplies the negative ones; 1 is none."""
    frequency_penalty: float = 0.0
    """Taken from a token's score for each time that it is in the output."""
    presence_penalty: float = 0.0
    """Taken from a token's score if it is in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the scores of these tokens."""
    allowed_token_ids: tuple[int, ...] = ()
    """Only these may be chosen; empty allows all."""
    constraint: Constraint | None = None
    """Only what this allows may be chosen."""


@dataclass(frozen=True)
class RepetitionGuard:
    """Ends an output that loops: its last tokens are a cycle of at most `max_cycle_tokens`, `min_repeats` times."""

    min_repeats: int = 4
    max_cycle_tokens: int = 32


@dataclass(frozen=True)
class StoppingCriteria:
    """When an output ends."""

    max_new_tokens: int | None = None
    """None takes the server's default, cut to what the context has room for. 0 only computes the prompt."""
    min_new_tokens: int = 0
    """Until there are so many, end marks and stop tokens are not chosen and stop strings do not count."""
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_string: bool = False
    """Whether the text ends with the stop string that was met."""
    ignore_eos: bool = False
    time_limit_s: float | None = None
    """Since arrival; the output ends with what there is."""
    repetition_guard: RepetitionGuard | None = None


@dataclass(frozen=True)
class LogprobOptions:
    """Which tokens get a `TokenLogprob`."""

    prompt: bool = False
    output: bool = False
    num_top: int = 0
    """How many of the likeliest tokens it names."""


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
    prompt: str | tuple[int, ...] | Conversation
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    stopping: StoppingCriteria = field(default_factory=StoppingCriteria)
    logprobs: LogprobOptions = field(default_factory=LogprobOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    priority: int = 0
    """Higher goes first; among equals the earlier arrival."""
    skip_special_tokens: bool = True
    """Whether special tokens, such as the end mark, are left out of the text."""
    truncate_prompt_tokens: int | None = None
    """Only so many of the prompt's last tokens are used."""
    resume_token_ids: tuple[int, ...] = ()
    """An output as far as it has come: what follows is what would have followed."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, by its own scores: before penalties, biases, constraints and temperature."""

    token_id: int
    logprob: float
    """Natural logarithm of the probability."""
    rank: int
    """1 for the likeliest token."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log probabilities, the likeliest first."""


class FinishReason(enum.Enum):
    """Why an output ended."""

    MAX_NEW_TOKENS = enum.auto()
    EOS_TOKEN = enum.auto()
    STOP_STRING = enum.auto()
    STOP_TOKEN = enum.auto()
    CONTEXT_LENGTH = enum.auto()
    CANCELLED = enum.auto()
    TIME_LIMIT = enum.auto()
    REPETITION = enum.auto()
    CONTENT_FILTER = enum.auto()


@dataclass(frozen=True)
class Finish:
    """The end of an output: why, and the stop token or stop string that was met, if one was."""

    reason: FinishReason
    stop_token_id: int | None = None
    stop_string: str | None = None


@dataclass(frozen=True)
class TokenEvent:
    """What one step of the engine did for one sequence of a request.

    Each sequence ends with one `finish`, the last of them with `stats`; or the request ends with one `error`.
    """

    request_id: str
    index: int = 0
    """Of the request's sequences."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of `token_ids`, if asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens but the first, if asked for; in the first event only."""
    finish: Finish | None = None
    error: Exception | None = None
    stats: RequestStats | None = None
    """With the last `finish`, and with the `error` of a step."""


@dataclass(frozen=True)
class RequestStats:
    """The account of one request. Times are seconds since the epoch; None where it has not got that far."""

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
    """Of one in flight: now."""


@dataclass(frozen=True)
class OutputDelta:
    """A piece of one sequence's output; the first has `prompt_logprobs`, the last of all sequences `stats`."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    stats: RequestStats | None = None


@dataclass(frozen=True)
class Output:
    """One sequence's whole output."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: Finish


@dataclass(frozen=True)
class Generation:
    """What came of a request: an output for each of its sequences."""

    outputs: tuple[Output, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    stats: RequestStats

    @property
    def text(self) -> str:
        """The first output's."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first output's."""
        return self.outputs[0].token_ids

    @property
    def finish(self) -> Finish:
        """The first output's."""
        return self.outputs[0].finish


def sequence_seed(seed: int, index: int) -> int:
    """The seed of a request's sequence: the request's own for the first, a hash of it and the index for the others."""
    if index == 0:
        return seed
    return int.from_bytes(blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest())
