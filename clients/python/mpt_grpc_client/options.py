"""The options of a generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from mpt_grpc_client.constraints import Constraint
from mpt_grpc_client.tools import ToolLike


@dataclass(frozen=True)
class RepetitionGuard:
    """Ends an output whose last tokens repeat a sequence of up to `max_cycle_tokens` tokens `min_repeats` times."""

    min_repeats: int = 4
    """Range: 2 to 1000."""
    max_cycle_tokens: int = 32
    """Range: 1 to 256."""


class GenerateOptions(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`.

    An option that is omitted or None takes the server's default; those given here apply unless the server was started
    with `--generation-config model`.
    """

    max_new_tokens: int | None
    """Maximum number of new tokens; 0 only computes the prompt. Default: 256, or less if the context has less room."""
    min_new_tokens: int | None
    """Minimum number of new tokens. Until it is reached, end-of-sequence and stop tokens are not sampled and stop
    strings are ignored. Default: 0."""
    temperature: float | None
    """Sampling temperature; 0 selects greedy decoding. Range: 0 to 100. Default: 1."""
    top_k: int | None
    """Keep only the k most likely tokens. Default: 0, which keeps all."""
    top_p: float | None
    """Keep the most likely tokens whose total probability reaches this value. Range: above 0, up to 1. Default: 1."""
    min_p: float | None
    """Remove tokens less likely than this fraction of the most likely token. Range: 0 to 1. Default: 0."""
    typical_p: float | None
    """Keep the most typical tokens whose total probability reaches this value. Range: above 0, up to 1. Default: 1."""
    seed: int | None
    """Seed of the random number generator. Range: 0 to 2^64 - 1. Default: random, and returned in the result."""
    num_sequences: int | None
    """Number of outputs, each with its own seed. Range: 1 to 16. Default: 1."""
    repetition_penalty: float | None
    """Divides positive logits, and multiplies negative logits, of tokens in the prompt or the output. Range: above 0,
    up to 10. Default: 1, which has no effect."""
    frequency_penalty: float | None
    """Subtracted from a token's logit for each occurrence in the output. Range: -2 to 2. Default: 0."""
    presence_penalty: float | None
    """Subtracted from the logit of every token in the output. Range: -2 to 2. Default: 0."""
    logit_bias: Mapping[int, float] | None
    """Added to the logits of these token IDs. At most 1024 entries. Range: -100 to 100."""
    allowed_token_ids: Sequence[int] | None
    """Restricts the output to these token IDs. Default: all. Cannot be combined with a constraint."""
    constraint: Constraint | None
    """Restricts the output to a JsonSchema, JsonObject, Regex, Choice or LarkGrammar."""
    max_whitespace: int | None
    """The most consecutive whitespace characters between the elements of JSON, with JsonSchema or JsonObject. With 0,
    some models do not end a number. Range: 0 to 8. Default: 1."""
    stop_strings: str | Sequence[str] | None
    """A string, or up to 16 strings, that end the output. Each has 1 to 256 bytes."""
    stop_token_ids: Sequence[int] | None
    """Up to 64 token IDs that end the output. Their text is not included."""
    include_stop_string: bool | None
    """Whether the text includes the stop string that ended the output. Default: False."""
    ignore_eos: bool | None
    """Whether to continue past the end-of-sequence token. Default: False. Cannot be combined with a constraint."""
    time_limit: float | None
    """Seconds after arrival at which the partial output is returned. Must be positive. Default: no limit."""
    repetition_guard: RepetitionGuard | None
    """Ends an output that repeats itself. Default: off."""
    skip_special_tokens: bool | None
    """Whether to omit special tokens, such as the end-of-sequence token, from the text. Default: True."""
    return_token_ids: bool | None
    """Whether the result has the `token_ids` of the output. Default: False."""
    return_prompt_token_ids: bool | None
    """Whether the result has the `prompt_token_ids`. Default: False."""
    return_logprobs: bool | None
    """Whether the result has the `logprobs` of the output tokens. Default: False."""
    return_prompt_logprobs: bool | None
    """Whether the result has the `prompt_logprobs`. The prompt is then computed without reading the prefix cache.
    Default: False."""
    top_logprobs: int | None
    """Number of most likely tokens to return with each log probability. Range: 0 to 20. Default: 0."""
    chunk_tokens: int | None
    """Number of new tokens that a stream sends together. The first token and the end of an output are not delayed.
    Range: 1 to 1024. Default: 1, or no number if `chunk_interval` is set."""
    chunk_interval: float | None
    """Seconds after which a stream sends the tokens held back along with the next one. Must be positive. Default: no
    limit."""
    truncate_prompt_tokens: int | None
    """Keep only the last N prompt tokens, at least 1. Default: all. Not supported for messages."""
    drop_oldest_turns: bool | None
    """Whether to drop the oldest messages if the conversation does not fit. Default: False, which refuses it."""
    add_generation_prompt: bool | None
    """Whether the prompt ends with the beginning of the assistant's message. Default: True. If False, it ends with the
    last message, which may have any role."""
    continue_final_message: bool | None
    """Whether the output continues the last message, which must be the assistant's. Default: False."""
    chat_template_kwargs: Mapping[str, Any] | None
    """Variables of the chat template, as JSON values of at most 16 KiB. Default: none. Names that the server sets, such
    as `messages` and `eos_token`, are refused."""
    tools: Sequence[ToolLike] | None
    """Up to 128 tools that the model may call: functions, pydantic models, `Tool`s or mappings in OpenAI's format.
    Default: none."""
    tool_choice: Literal["auto", "none", "required"] | None
    """Whether the model may call tools, must not, or must. Default: auto."""
    allowed_tools: Sequence[str] | None
    """The names of the tools that may be called. Default: all."""
    parallel_tool_calls: bool | None
    """Whether an output may have several calls. Default: True."""
    resume_token_ids: Sequence[int] | None
    """The tokens of a partial output to resume, with the same request and seed. The result has only what follows."""
    request_id: str | None
    """Identifies the request in `cancel`, traces and logs. At most 128 bytes. Default: generated by the server."""
    model: str | None
    """The name of the model, as in `get_model_info`. Default: the loaded model."""
    priority: int | None
    """Requests with higher values run first. Range: -100 to 100. Default: 0."""
    cache_bypass: bool | None
    """Whether to neither read nor write the prefix cache. Default: False."""
    cache_salt: str | None
    """Restricts sharing of the prefix cache to requests with the same salt. At most 128 bytes. Default: empty."""
