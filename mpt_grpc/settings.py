"""What the server can be told, one frozen class a section. Ranges are checked here; flags are read in `cli.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mpt_grpc.errors import SettingsError


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how it computes."""

    model: str = "demo"
    """'demo', a folder in Hugging Face's layout, or a hub id."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    load_format: Literal["auto", "random"] = "auto"
    """'random' fills the shape with random weights instead of reading them."""
    max_context_tokens: int | None = None
    """The most tokens of one request; None takes the model's `max_seq_len`."""
    chat_template: str = "auto"
    """'base', 'instruct', 'chatml' or a Jinja file; 'auto' takes the model's own, else goes by its name."""

    def __post_init__(self) -> None:
        _at_least(1, max_context_tokens=self.max_context_tokens)


@dataclass(frozen=True)
class CacheSettings:
    """How large the KV cache is."""

    kv_cache_gib: float | None = None
    """None takes 1 GiB on a CPU, and on a GPU what is left of `memory_fraction` after the weights."""
    memory_fraction: float = 0.9
    """The share of a GPU's memory that weights and cache may fill."""

    def __post_init__(self) -> None:
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < math.inf:
            raise SettingsError(f"--kv-cache-gib: {self.kv_cache_gib} is not a number above 0")
        if not 0 < self.memory_fraction <= 1:
            raise SettingsError(f"--memory-fraction: {self.memory_fraction} is not in (0, 1]")


@dataclass(frozen=True)
class SchedulerSettings:
    """How many requests run and wait, and how much one step computes."""

    max_running_requests: int = 64
    max_waiting_requests: int = 1024
    max_step_tokens: int = 512

    def __post_init__(self) -> None:
        _at_least(1, max_running_requests=self.max_running_requests)
        _at_least(0, max_waiting_requests=self.max_waiting_requests)
        if self.max_step_tokens < self.max_running_requests:
            raise SettingsError(
                f"--max-step-tokens: {self.max_step_tokens} is below --max-running-requests"
                f" {self.max_running_requests}: each running request needs a token in every step"
            )


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens and how it stops."""

    host: str = "127.0.0.1"
    port: int = 50051
    """0 takes a free port."""
    grace_s: float = 30.0
    """How long running requests may take to finish after SIGTERM."""
    stall_timeout_s: float = 120.0
    """Health says NOT_SERVING when work waits and no step has finished for so long."""
    max_message_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"--port: {self.port} is not in [0, 65535]")
        _at_least(0, grace_s=self.grace_s)
        if not self.stall_timeout_s > 0:
            raise SettingsError(f"--stall-timeout-s: {self.stall_timeout_s} is not above 0")

    @property
    def bracketed_host(self) -> str:
        """As an address with a port writes it."""
        return f"[{self.host}]" if ":" in self.host else self.host


@dataclass(frozen=True)
class HttpSettings:
    """OpenAI's API in front of the gRPC API."""

    port: int | None = 8451
    """0 takes a free port, None serves none."""
    strict_model_names: bool = False
    """Whether a request has to name the loaded model; else any name is answered by it."""

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port <= 65535:
            raise SettingsError(f"--http-port: {self.port} is not in [0, 65535]")


@dataclass(frozen=True)
class Settings:
    """All of it."""

    model: ModelSettings = field(default_factory=ModelSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    guards: tuple[str, ...] = ()
    """What watches prompts and outputs: names of entry points, each with its argument after a `=`."""
    trace_file: Path | None = None
    """Spans are appended to it, one JSON object a line."""


def _at_least(minimum: int, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise SettingsError(f"--{name.replace('_', '-')}: {value} is below {minimum}")
