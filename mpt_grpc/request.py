"""Requests as frozen values, with the names of the API (`protos/mpt/v1`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

from mpt_grpc.caller import ANONYMOUS, Caller
from mpt_grpc.constraint import Constraint
from mpt_grpc.conversation import Conversation, OutputConstraint


@dataclass(frozen=True)
class SamplingParameters:
    """How the next token is sampled. Applied in the order temperature, top-k, top-p, min-p, typical-p."""

    temperature: float = 1.0
    """0 selects greedy decoding."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose total probability reaches this value; 1 keeps all."""
    min_p: float = 0.0
    """Remove tokens less likely than this fraction of the most likely token; 0 keeps all."""
    typical_p: float = 1.0
    """Keep the smallest set of most typical tokens whose total probability reaches this value; 1 keeps all."""
    seed: int | None = None
    """An unsigned 64-bit number; None lets the engine choose a random one."""
    num_sequences: int = 1
    """The number of outputs, each with its own seed; see `sequence_seed`."""


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
class DecodingOptions:
    """How the logits are processed before sampling, in this order; also applies to greedy decoding."""

    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative logits, of tokens in prompt and output; 1 has no effect."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each of its occurrences in the output."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that occurs in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token IDs."""
    allowed_token_ids: tuple[int, ...] = ()
    """Restricts the output to these token IDs; empty allows all."""
    constraint: Constraint | None = None
    """Restricts the output to a formal language."""

    @property
    def penalizes(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @cached_property
    def allowed_mask(self) -> bytes:
        """The allowed tokens as a bit mask that ends with the last one: bit i % 8 of byte i // 8 stands for token i."""
        mask = bytearray(max(self.allowed_token_ids, default=-1) // 8 + 1)
        for token_id in self.allowed_token_ids:
            mask[token_id >> 3] |= 1 << (token_id & 7)
        return bytes(mask)


@dataclass(frozen=True)
class RepetitionGuard:
    """Ends an output whose last tokens repeat a sequence of at most `max_cycle_tokens` tokens `min_repeats` times."""

    min_repeats: int = 4
    max_cycle_tokens: int = 32


@dataclass(frozen=True)
class StoppingCriteria:
    """When generation stops."""

    max_new_tokens: int | None = None
    """None takes the server's default, reduced to the room in the context. 0 only computes the prompt."""
    min_new_tokens: int = 0
    """Until it is reached, end-of-sequence and stop tokens are not sampled and stop strings are ignored."""
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_string: bool = False
    """Whether the text includes the stop string that ended the output."""
    ignore_eos: bool = False
    time_limit_s: float | None = None
    """The maximum age of the request in seconds, after which the partial output is returned."""
    repetition_guard: RepetitionGuard | None = None


@dataclass(frozen=True)
class LogprobOptions:
    """Which tokens have a `TokenLogprob` in the result."""

    prompt: bool = False
    output: bool = False
    num_top: int = 0
    """The number of most likely tokens to include at each position."""


@dataclass(frozen=True)
class ChunkOptions:
    """When a stream sends an output's new tokens: at its first one, its end, and whichever of these comes first."""

    num_tokens: int | None = None
    """When this many tokens are new; None is 1, or any number if there is an interval."""
    interval_s: float | None = None
    """When a token is new and this many seconds have passed since the last ones were sent."""


@dataclass(frozen=True)
class CacheOptions:
    """How the request uses the prefix cache."""

    bypass: bool = False
    """Whether to neither read nor write it."""
    salt: str = ""
    """Restricts sharing of blocks to requests with the same salt."""


@dataclass(frozen=True)
class PartialOutput:
    """The beginning of an output, which is to be resumed."""

    index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue, and how."""

    request_id: str
    prompt: str | tuple[int, ...] | Conversation
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    stopping: StoppingCriteria = field(default_factory=StoppingCriteria)
    logprobs: LogprobOptions = field(default_factory=LogprobOptions)
    chunks: ChunkOptions = field(default_factory=ChunkOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    priority: int = 0
    """Requests with higher values run first; those of one caller with equal priorities run in order of arrival."""
    skip_special_tokens: bool = True
    """Whether to omit special tokens, such as the end-of-sequence token, from the text."""
    truncate_prompt_tokens: int | None = None
    """Keep only this many tokens from the end of the prompt."""
    resume_token_ids: tuple[int, ...] = ()
    """The tokens of a partial output to resume; the result is what would have followed."""
    caller: Caller = ANONYMOUS
    resume_outputs: tuple[PartialOutput, ...] = ()
    """The partial outputs to resume if there are several; outputs that are not listed are not generated."""

    @cached_property
    def constraint(self) -> OutputConstraint | None:
        """The formal language that restricts the outputs: the requested constraint, or calls of tools."""
        content = self.decoding.constraint
        calls = self.prompt.tool_calls(content) if isinstance(self.prompt, Conversation) else None
        return calls or content

    @cached_property
    def outputs(self) -> Mapping[int, tuple[int, ...]]:
        """The indices of the outputs to generate, in order, each with the tokens to resume."""
        if self.resume_outputs:
            return dict(sorted((output.index, output.token_ids) for output in self.resume_outputs))
        return dict.fromkeys(range(self.sampling.num_sequences), self.resume_token_ids)


def sequence_seed(seed: int, index: int) -> int:
    """Returns the seed of a sequence: the request's own for the first, and a hash of it and the index for the
    others."""
    if index == 0:
        return seed
    return int.from_bytes(blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest())
