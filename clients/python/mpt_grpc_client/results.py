"""What the client answers, as frozen values; `responses.py` makes them."""

from __future__ import annotations

import builtins
import enum
from dataclasses import dataclass


class FinishReason(enum.Enum):
    """Why an output ended; the numbers are the API's."""

    UNKNOWN = 0
    """A reason that is younger than this client."""
    MAX_NEW_TOKENS = 1
    EOS_TOKEN = 2
    """The model's end mark, or the end of all that a constraint allows."""
    STOP_STRING = 3
    STOP_TOKEN = 4
    CONTEXT_LENGTH = 5
    """The context is full."""
    CANCELLED = 6
    """`abort` was called."""
    TIME_LIMIT = 7
    REPETITION = 8
    """The repetition guard saw it go in circles."""
    CONTENT_FILTER = 9
    """A guard of the server ended it; what it objected to was not sent."""

    @classmethod
    def _missing_(cls, value: object) -> FinishReason | None:
        return cls.UNKNOWN if isinstance(value, int) else None


@dataclass(frozen=True)
class Finish:
    """The end of an output: why, and the stop token (or end mark) or stop string that was met, if one was."""

    reason: FinishReason
    stop_token_id: int | None = None
    stop_string: str | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts of a request."""

    num_prompt_tokens: int
    num_cached_tokens: int
    """Tokens of the prompt that were taken from the prefix cache."""
    num_output_tokens: int
    num_preemptions: int
    """How often the request gave its memory back to others and was computed again."""


@dataclass(frozen=True)
class Timings:
    """Where a request's time went on the server; None for a phase that was never entered."""

    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    """From the first token to the last."""
    time_to_first_token_s: float | None


@dataclass(frozen=True)
class TopLogprob:
    """One of the likeliest tokens at a place; its bytes need not be whole characters."""

    token_id: int
    bytes: builtins.bytes
    logprob: float
    """The natural logarithm of its probability."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token, by its own scores: before penalties, biases and temperature."""

    token_id: int
    bytes: builtins.bytes
    logprob: float
    """The natural logarithm of its probability."""
    rank: int
    """How many tokens were likelier, plus 1."""
    top: tuple[TopLogprob, ...]
    """The likeliest first, as many as `top_logprobs` asks for."""


@dataclass(frozen=True)
class Delta:
    """What is new of one output of a stream."""

    index: int
    text: str
    """May be empty."""
    num_tokens: int
    token_ids: tuple[int, ...]
    """Empty unless asked for by `return_token_ids`."""
    logprobs: tuple[TokenLogprob, ...]
    """Empty unless asked for by `return_logprobs`."""
    finish: Finish | None
    """In the output's last delta."""


@dataclass(frozen=True)
class Output:
    """One whole output."""

    index: int
    text: str
    num_tokens: int
    """Tokens generated; those of special tokens and of a stop string included."""
    token_ids: tuple[int, ...]
    """Empty unless asked for by `return_token_ids`."""
    logprobs: tuple[TokenLogprob, ...]
    """Empty unless asked for by `return_logprobs`."""
    finish: Finish
    seed: int
    """A request for one output with this seed gives the same."""


@dataclass(frozen=True)
class Generation:
    """The outputs of a request with their account."""

    request_id: str
    outputs: tuple[Output, ...]
    """One unless `num_sequences` asks for more."""
    prompt_token_ids: tuple[int, ...]
    """Empty unless asked for by `return_prompt_token_ids`."""
    prompt_logprobs: tuple[TokenLogprob, ...]
    """Of the prompt's second token and so on; empty unless asked for by `return_prompt_logprobs`."""
    usage: Usage
    timings: Timings
    seed: int
    """The seed that was used, of the first output."""
    trace_id: str
    """The W3C trace id, 32 hexadecimal digits; empty if the request was not traced."""

    @property
    def text(self) -> str:
        """The first output's."""
        return self.outputs[0].text

    @property
    def num_tokens(self) -> int:
        """The first output's."""
        return self.outputs[0].num_tokens

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first output's."""
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """The first output's."""
        return self.outputs[0].logprobs

    @property
    def finish(self) -> Finish:
        """The first output's."""
        return self.outputs[0].finish


@dataclass(frozen=True)
class Token:
    """One token of a text; its bytes need not be whole characters."""

    id: int
    bytes: builtins.bytes


@dataclass(frozen=True)
class ModelInfo:
    """The model that is loaded."""

    name: str
    num_parameters: int
    dtype: str
    """What it computes in: float32, float16 or bfloat16."""
    device: str
    """Where it computes: cpu or cuda."""
    vocab_size: int
    max_context_tokens: int
    """The most tokens, prompt and output together, that one request may have."""
    eos_token_ids: tuple[int, ...]
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    chat_template: str
    """What makes prompts of messages: base, instruct, chatml, model (its own) or file."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server."""

    max_running_requests: int
    max_waiting_requests: int
    max_step_tokens: int
    """Tokens that one step computes at most."""
    max_message_bytes: int
    cache_tokens: int


@dataclass(frozen=True)
class Load:
    """How busy a server is; the last three count since its start."""

    running_requests: int
    waiting_requests: int
    total_blocks: int
    free_blocks: int
    steps: int
    generated_tokens: int
    batched_sequences: int
    """Summed over the steps: divided by `steps` it is the mean batch size."""


@dataclass(frozen=True)
class ServerInfo:
    """A server's limits and load."""

    version: str
    uptime_s: float
    limits: Limits
    load: Load


@dataclass(frozen=True)
class SequenceState:
    """An output as far as it has come."""

    index: int
    num_computed_tokens: int
    """Tokens, of prompt and output, that are computed and held in the blocks."""
    num_output_tokens: int
    blocks: tuple[int, ...]
    """Of the KV cache, in the order of its tokens; others may share the first ones. Empty while it waits, and ended."""
    finish_reason: FinishReason | None
    """None while it has not ended, and after an error."""


@dataclass(frozen=True)
class RequestState:
    """A request as far as it has come; times by the server's clock, in seconds since the epoch."""

    request_id: str
    arrival_time_s: float
    end_time_s: float | None
    """None in flight."""
    timings: Timings
    usage: Usage
    sequences: tuple[SequenceState, ...]


@dataclass(frozen=True)
class EngineState:
    """What a server's engine was doing at `time_s`, between two steps."""

    time_s: float
    load: Load
    kept_blocks: tuple[int, ...]
    """Blocks that no request holds and that are kept because their content can be found again."""
    in_flight: tuple[RequestState, ...]
    """By arrival."""
    ended: tuple[RequestState, ...]
    """The last 64, by their end."""
