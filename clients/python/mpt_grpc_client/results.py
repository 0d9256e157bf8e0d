"""What calls return: generations and tokens. Times are in seconds."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from mpt_grpc_client.prompts import Message, Role
from mpt_grpc_client.tools import ToolCall, ToolCallDelta


class FinishReason(enum.Enum):
    """The reason an output ended."""

    UNKNOWN = 0
    """A reason that this version of the client does not know."""
    MAX_NEW_TOKENS = 1
    EOS_TOKEN = 2
    """The model generated its end-of-sequence token, or the constraint is complete."""
    STOP_STRING = 3
    STOP_TOKEN = 4
    CONTEXT_LENGTH = 5
    """The context is full."""
    CANCELLED = 6
    """The request was cancelled by `cancel`."""
    TIME_LIMIT = 7
    REPETITION = 8
    """The repetition guard detected repetition."""
    CONTENT_FILTER = 9
    """A guard configured on the server ended the output. The offending text was not sent."""
    TOOL_CALLS = 10
    """The model ended the output with calls of tools, which are complete."""

    @classmethod
    def _missing_(cls, value: object) -> FinishReason | None:
        return cls.UNKNOWN if isinstance(value, int) else None


@dataclass(frozen=True)
class Finish:
    """Why an output ended, and the token or string that ended it, if there is one."""

    reason: FinishReason
    stop_token_id: int | None = None
    """The end-of-sequence or stop token."""
    stop_string: str | None = None

    def __str__(self) -> str:
        matched = self.stop_token_id if self.stop_string is None else repr(self.stop_string)
        return self.reason.name if matched is None else f"{self.reason.name} ({matched})"


@dataclass(frozen=True)
class Usage:
    """Token counts of a request."""

    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that were read from the prefix cache."""
    num_output_tokens: int
    """Generated tokens of all outputs together, excluding resumed ones."""
    num_preemptions: int
    """How many times the request was preempted for lack of cache memory and recomputed."""


@dataclass(frozen=True)
class Timings:
    """How long each phase of a request took on the server; None for phases that it did not reach."""

    queue_time: float | None
    """From arrival to the first step."""
    prefill_time: float | None
    """From the first step to the first generated token."""
    decode_time: float | None
    """From the first generated token to the end of the request."""
    time_to_first_token: float | None
    """From arrival to the first generated token."""


@dataclass(frozen=True)
class TopLogprob:
    """One of the most likely tokens at a position."""

    token_id: int
    token_bytes: bytes
    """The bytes of the token, which need not be valid UTF-8 by themselves."""
    logprob: float
    """The natural logarithm of the token's probability."""


@dataclass(frozen=True)
class TokenLogprob:
    """The log probability of a token under the model's own distribution, before penalties, biases, constraints and
    temperature."""

    token_id: int
    token_bytes: bytes
    """The bytes of the token, which need not be valid UTF-8 by themselves."""
    logprob: float
    """The natural logarithm of the token's probability."""
    rank: int
    """The rank of the token by probability; 1 is the most likely token."""
    top_logprobs: tuple[TopLogprob, ...]
    """The most likely tokens in decreasing order, as many as requested by `top_logprobs`."""


@dataclass(frozen=True)
class Delta:
    """The new part of one output of a stream."""

    index: int
    text: str
    """May be empty."""
    num_tokens: int
    token_ids: tuple[int, ...]
    """Empty unless requested by `return_token_ids`."""
    logprobs: tuple[TokenLogprob, ...]
    """Empty unless requested by `return_logprobs`."""
    finish: Finish | None
    """Set in the last delta of the output."""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    """The new parts of calls."""


@dataclass(frozen=True)
class Output:
    """A complete output."""

    index: int
    text: str
    num_tokens: int
    """The number of generated tokens, including special tokens and those of a stop string."""
    token_ids: tuple[int, ...]
    """Empty unless requested by `return_token_ids`."""
    logprobs: tuple[TokenLogprob, ...]
    """Empty unless requested by `return_logprobs`."""
    finish: Finish
    seed: int
    """The seed with which a request for a single output returns the same output."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls of the option `tools`."""

    @property
    def message(self) -> Message:
        """The output as the assistant's message, to be added to the conversation."""
        return Message(Role.ASSISTANT, self.text, self.tool_calls)


@dataclass(frozen=True)
class Resumption:
    """A server that continued a generation which another one began."""

    target: str
    num_tokens: int
    """The number of tokens of all outputs that had been received by then."""
    is_exact: bool
    """Whether the tokens are certainly the same as without the change; False only with `resume_inexact`."""


@dataclass(frozen=True)
class Generation:
    """The outputs of a request, with its usage, timings, seed and trace ID."""

    request_id: str
    outputs: tuple[Output, ...]
    """As many as requested by `num_sequences`."""
    prompt_token_ids: tuple[int, ...]
    """Empty unless requested by `return_prompt_token_ids`."""
    prompt_logprobs: tuple[TokenLogprob, ...]
    """The log probabilities of the prompt from its second token; empty unless requested by `return_prompt_logprobs`."""
    usage: Usage
    timings: Timings
    seed: int
    """The seed of the first output."""
    trace_id: str
    """The W3C trace ID, 32 hexadecimal digits; empty if the request was not traced."""
    resumptions: tuple[Resumption, ...] = ()
    """The servers that continued the generation after another one had failed. `timings`, and of `usage` the cached
    tokens and the preemptions, are those of the last."""

    @property
    def text(self) -> str:
        """The text of the first output."""
        return self.outputs[0].text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls of tools in the first output."""
        return self.outputs[0].tool_calls

    @property
    def message(self) -> Message:
        """The first output as the assistant's message, to be added to the conversation."""
        return self.outputs[0].message

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the first output."""
        return self.outputs[0].num_tokens

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The token IDs of the first output."""
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """The log probabilities of the first output."""
        return self.outputs[0].logprobs

    @property
    def finish(self) -> Finish:
        """Why the first output ended."""
        return self.outputs[0].finish


@dataclass(frozen=True)
class Token:
    """A token."""

    token_id: int
    token_bytes: bytes
    """The bytes of the token, which need not be valid UTF-8 by themselves."""
