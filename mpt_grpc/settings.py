"""The server's settings, one frozen class for each section. Ranges are checked here; `commands/` reads the flags."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mpt_grpc.errors import SettingsError
from mpt_grpc.listening import address

ALL_ADDRESSES = ("0.0.0.0", "::")
"""The hosts that stand for every address of a machine."""


@dataclass(frozen=True)
class ModelSettings:
    """The model and how it is computed."""

    model: str = "demo"
    """'demo', a folder in Hugging Face's layout, or a Hugging Face Hub ID."""
    revision: str | None = None
    """A branch, tag or commit of the Hub's repository; None takes its default branch."""
    adapters: tuple[Path, ...] = ()
    """Folders of LoRA adapters, which are merged into the model in turn."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    attention: Literal["auto", "triton", "torch"] = "auto"
    """What computes attention on a GPU; 'auto' is Triton where it runs."""
    batch_invariant: bool = False
    """Whether a GPU gives a token the same bits in any batch; a CPU with the compiled kernels always does."""
    quantize: Literal["none", "int8"] = "none"
    """'int8' rounds the matrices to 8 bits when they are loaded, with one scale for each output."""
    load_format: Literal["auto", "random"] = "auto"
    """'random' initializes the model with random weights instead of reading them."""
    max_context_tokens: int | None = None
    """The maximum number of tokens of one request; None takes the model's `max_seq_len`."""
    chat_template: str = "auto"
    """'base', 'instruct', 'chatml', the name of one of the checkpoint's own, a Jinja file, or a template's text; 'auto'
    takes the checkpoint's default, or one chosen by its name."""
    generation_config: Literal["server", "model"] = "server"
    """The source of the defaults of sampling options: the documented ones, or the checkpoint's generation_config.json.
    """

    def __post_init__(self) -> None:
        if self.revision == "":
            raise SettingsError("--revision: empty; name a branch, tag or commit, or omit it")
        if self.adapters and self.load_format == "random":
            raise SettingsError("--adapter: cannot be merged into random weights; omit --load-format random")
        _at_least(2, max_context_tokens=self.max_context_tokens)


@dataclass(frozen=True)
class CacheSettings:
    """The size and the type of the KV cache."""

    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """'auto' is the type of the weights; 'int8' rounds each token's key and value of a head, with its own scale."""
    kv_cache_bytes: int | None = None
    """None takes 1 GiB on a CPU and, on a GPU, what weights and steps leave of `memory_fraction`."""
    memory_fraction: float = 0.95
    """The fraction of a GPU's memory that may be in use, by other processes as well."""
    memory_limit_bytes: int | None = None
    """How much of its memory a GPU is taken to have; None is all of it."""

    def __post_init__(self) -> None:
        if self.kv_cache_bytes is not None and self.kv_cache_bytes <= 0:
            raise SettingsError("--kv-cache: must be above 0")
        if self.memory_limit_bytes is not None and self.memory_limit_bytes <= 0:
            raise SettingsError("--memory-limit: must be above 0")
        if not 0 < self.memory_fraction <= 1:
            raise SettingsError(f"--memory-fraction: {self.memory_fraction} is not in (0, 1]")


@dataclass(frozen=True)
class SchedulerSettings:
    """The limits of the queue, the batch and a step."""

    max_running_requests: int = 64
    max_waiting_requests: int = 1024
    max_step_tokens: int = 512
    prefill_slowdown: float = 1.8
    """How many times as long a step may take for prompts beside running outputs as without; infinity is no limit."""
    speculate: Literal["none", "ngram"] = "none"
    """'ngram' drafts tokens from earlier text of prompt and output and checks several in one step."""

    def __post_init__(self) -> None:
        if not self.prefill_slowdown > 1:
            raise SettingsError(f"--prefill-slowdown: {self.prefill_slowdown} is not above 1")
        _at_least(1, max_running_requests=self.max_running_requests)
        _at_least(0, max_waiting_requests=self.max_waiting_requests)
        if self.max_step_tokens < self.max_running_requests:
            raise SettingsError(
                f"--max-step-tokens: {self.max_step_tokens} is below --max-running-requests, which is"
                f" {self.max_running_requests}; raise it, because each running request needs a token in every step"
            )


@dataclass(frozen=True)
class TlsSettings:
    """The files of a server's certificate, in PEM; they are read again when they change."""

    certificate: Path
    """The certificate, followed by those that lead to its authority."""
    key: Path
    client_ca: Path | None = None
    """The authorities, one of which must have issued the certificate of a client; None requires no certificate."""


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens, for whom, and how it stops."""

    host: str = "127.0.0.1"
    grpc_port: int = 50051
    """0 selects a free port."""
    grpc_socket: Path | None = None
    """The Unix socket on which gRPC listens instead of the port."""
    tls: TlsSettings | None = None
    """None serves without TLS, as Unix sockets always do."""
    tokens_file: Path | None = None
    """The access tokens that callers need, in TOML; None requires none."""
    reflection: bool = True
    """Whether gRPC's reflection describes the API."""
    grace_s: float = 30.0
    """How long running requests may take to finish after SIGTERM."""
    read_timeout_s: float = 600.0
    """Streams end when nothing could be sent for this long, because their callers do not read."""
    stall_timeout_s: float = 120.0
    """Health reports NOT_SERVING when requests wait or run and no step has completed for this long."""
    max_connection_age_s: float | None = None
    """gRPC connections older than this get no new calls, and end with their last one; None keeps them."""

    def __post_init__(self) -> None:
        if not 0 <= self.grpc_port <= 65535:
            raise SettingsError(f"--grpc-port: {self.grpc_port} is not in [0, 65535]")
        if self.host.startswith("["):
            raise SettingsError(f"--host: write the IPv6 address without brackets: {self.host.strip('[]')}")
        if self.host.startswith("unix:") or "/" in self.host:
            why = "not a host name or an IP address; serve --grpc-socket PATH listens on a Unix socket"
            raise SettingsError(f"--host: {self.host!r}: {why}")
        times = {
            "--read-timeout": self.read_timeout_s,
            "--stall-timeout": self.stall_timeout_s,
            "--max-connection-age": self.max_connection_age_s,
        }
        for name, time_s in times.items():
            if time_s is not None and not time_s > 0:
                raise SettingsError(f"{name}: must be above 0")

    @property
    def reachable_host(self) -> str:
        """The host by which clients on this machine reach the server."""
        return "localhost" if self.host in ALL_ADDRESSES else self.host

    def url(self, port: int) -> str:
        """Returns the URL of an HTTP port for clients on this machine, without a path."""
        return f"http{'s' if self.tls else ''}://{address(self.reachable_host, port)}"


@dataclass(frozen=True)
class HttpSettings:
    """Where the OpenAI-compatible API is served."""

    port: int | None = 8451
    """0 selects a free port; None serves no HTTP."""
    strict_model_names: bool = False
    """Whether to refuse requests that name another model instead of serving them with the loaded one."""
    allow_hosts: tuple[str, ...] = ()
    """The names accepted in `Host` on a loopback address, in addition to those of this machine."""
    allow_origins: tuple[str, ...] = ()
    """The websites that may send requests, such as https://example.com; '*' stands for all."""

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port <= 65535:
            raise SettingsError(f"--http-port: {self.port} is not in [0, 65535]")
        for host in self.allow_hosts:
            if not host or set(host) & set("/:*"):
                raise SettingsError(f"--allow-host: {host!r} is not a host name; omit the scheme and the port")
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                why = "is not an origin; write the scheme, the host and the port, such as http://localhost:3000"
                raise SettingsError(f"--allow-origin: {origin!r} {why}")


@dataclass(frozen=True)
class TelemetrySettings:
    """What is recorded of the server's work; OpenTelemetry's variables say where it is exported."""

    metrics_port: int | None = None
    """The port of `/metrics`, apart from that on the HTTP port; 0 selects a free port, None serves none."""
    channelz_port: int | None = None
    """The port of channelz, on this machine only; 0 selects a free port, None serves none."""
    trace_file: Path | None = None
    """The file to which spans are appended, one JSON object per line."""
    trace_steps: int | None = None
    """Trace one in this many steps; None traces none."""

    def __post_init__(self) -> None:
        for flag, port in (("--metrics-port", self.metrics_port), ("--channelz-port", self.channelz_port)):
            if port is not None and not 0 <= port <= 65535:
                raise SettingsError(f"{flag}: {port} is not in [0, 65535]")
        _at_least(1, trace_steps=self.trace_steps)


@dataclass(frozen=True)
class Settings:
    """All settings of a server."""

    model: ModelSettings = field(default_factory=ModelSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    guards: tuple[str, ...] = ()
    """The guards on prompts and outputs: names of entry points, each optionally followed by `=` and an argument."""
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)

    @property
    def serves_http(self) -> bool:
        """Whether a port speaks HTTP, on which `/metrics` is served."""
        return self.http.port is not None or self.telemetry.metrics_port is not None


def _at_least(minimum: int, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise SettingsError(f"--{name.replace('_', '-')}: {value} is below {minimum}")
