"""Information about a server and its model. Times are in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationDefaults:
    """The values used for options that a request does not set."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    max_new_tokens: int
    """Reduced to the room in the context."""


@dataclass(frozen=True)
class ModelInfo:
    """Information about the loaded model."""

    name: str
    num_parameters: int
    dtype: str
    """The data type used for computation: float32, float16 or bfloat16."""
    device: str
    """The device used for computation: cpu or cuda."""
    vocab_size: int
    max_context_tokens: int
    """The maximum number of tokens of one request, prompt and output together."""
    eos_token_ids: tuple[int, ...]
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    chat_template: str
    """The chat template applied to messages: base, instruct, chatml, model (one of the checkpoint's), file or text."""
    defaults: GenerationDefaults


@dataclass(frozen=True)
class Limits:
    """The limits of a server."""

    max_running_requests: int
    max_waiting_requests: int
    max_step_tokens: int
    """The maximum number of tokens computed in one step."""
    max_message_bytes: int
    max_cache_tokens: int
    max_counts: dict[str, int]
    """The maximum number of items of lists and maps, by the path of the field in the API."""
    max_bytes: dict[str, int]
    """The maximum size of strings, by the path of the field in the API."""


@dataclass(frozen=True)
class Load:
    """The load of a server. The numbers of steps, tokens and batched sequences are totals since it started."""

    num_running_requests: int
    num_waiting_requests: int
    num_blocks: int
    num_free_blocks: int
    """KV cache blocks that are not used by a request, including those retained by the prefix cache."""
    num_steps: int
    num_output_tokens: int
    num_batched_sequences: int
    """The number of sequences computed, summed over all steps. Divided by `num_steps`, this is the mean batch size."""
    num_preparing_requests: int = 0
    """Requests that are being prepared for the queue: tokenized, and their constraints compiled."""
    num_draft_tokens: int = 0
    """Drafts that speculation has checked."""
    num_accepted_tokens: int = 0
    """Drafts that were accepted: each one saved a step of its output."""


@dataclass(frozen=True)
class ServerInfo:
    """A server's version, limits and load."""

    version: str
    uptime: float
    limits: Limits
    load: Load
    fingerprint: str = ""
    """What the tokens depend on besides the request. Servers with the same one continue each other's outputs."""
