"""The flags of `serve`, and their translation into settings."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from mpt_grpc.commands import listening_options
from mpt_grpc.commands.logs import add_log
from mpt_grpc.commands.model_options import add_model, model_settings
from mpt_grpc.commands.units import num_bytes, seconds
from mpt_grpc.settings import (
    CacheSettings,
    ModelSettings,
    SchedulerSettings,
    ServerSettings,
    Settings,
    TelemetrySettings,
)


def add_flags(serve: argparse.ArgumentParser) -> None:
    """Adds all flags: the model, memory and scheduling, the server and telemetry."""
    _add_model(add_model(serve))
    _add_scheduling(serve.add_argument_group("memory and scheduling"))
    _add_server(serve.add_argument_group("server"))
    _add_telemetry(serve.add_argument_group("telemetry"))


def _add_model(model: argparse._ArgumentGroup) -> None:
    """Adds what concerns only a model that is served."""
    defaults = ModelSettings()
    model.add_argument(
        "--load-format",
        choices=("auto", "random"),
        default=defaults.load_format,
        help="random initializes the model with random weights, for benchmarks without a checkpoint",
    )
    model.add_argument(
        "--max-context-tokens",
        type=int,
        metavar="N",
        help="maximum tokens of one request, prompt and output; ALiBi models can exceed their own limit (default: the"
        " model's)",
    )
    model.add_argument(
        "--generation-config",
        choices=("server", "model"),
        default=defaults.generation_config,
        help="source of the defaults of sampling options: the documented ones, or the checkpoint's"
        " generation_config.json",
    )


def _add_scheduling(memory: argparse._ArgumentGroup) -> None:
    """Adds the memory of the cache and the limits of the queue and the batch."""
    defaults = Settings()
    memory.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "int8"),
        default=defaults.cache.kv_cache_dtype,
        help="int8 holds almost twice the tokens, on a CPU or a GPU with Triton; auto is the type of the weights",
    )
    memory.add_argument(
        "--kv-cache",
        type=num_bytes,
        metavar="SIZE",
        help="size of the KV cache, such as 4GiB (default: 1GiB on a CPU; on a GPU, what weights and steps leave of"
        " --memory-fraction)",
    )
    memory.add_argument(
        "--memory-fraction",
        type=float,
        default=defaults.cache.memory_fraction,
        metavar="X",
        help="fraction of a GPU's memory that may be in use, by other processes as well",
    )
    memory.add_argument(
        "--memory-limit",
        type=num_bytes,
        metavar="SIZE",
        help="use a GPU as if this were all of its memory, such as 16GiB (default: all that it has)",
    )
    memory.add_argument(
        "--max-running-requests",
        type=int,
        default=defaults.scheduler.max_running_requests,
        metavar="N",
        help="maximum requests in one batch",
    )
    memory.add_argument(
        "--max-waiting-requests",
        type=int,
        default=defaults.scheduler.max_waiting_requests,
        metavar="N",
        help="maximum requests in the queue; further ones are refused with RESOURCE_EXHAUSTED",
    )
    memory.add_argument(
        "--max-step-tokens",
        type=int,
        default=defaults.scheduler.max_step_tokens,
        metavar="N",
        help="maximum tokens computed in one step; longer prompts are computed in chunks",
    )
    memory.add_argument(
        "--prefill-slowdown",
        type=float,
        default=defaults.scheduler.prefill_slowdown,
        metavar="X",
        help="factor by which prompts being computed may slow down running outputs; a prompt's own speed rises with"
        " it; inf for no limit",
    )
    memory.add_argument(
        "--speculate",
        choices=["none", "ngram"],
        default=defaults.scheduler.speculate,
        help="ngram drafts the next tokens from earlier text of prompt and output and checks several in one step, where"
        " that is faster; the tokens stay the same",
    )


def _add_server(server: argparse._ArgumentGroup) -> None:
    """Adds where the server listens, for whom, and how it stops."""
    grpc = server.add_mutually_exclusive_group()
    grpc.add_argument(
        "--grpc-port",
        type=int,
        default=ServerSettings().grpc_port,
        metavar="N",
        help="port of the gRPC server; 0 selects a free port",
    )
    grpc.add_argument(
        "--grpc-socket",
        type=Path,
        metavar="PATH",
        help="Unix socket on which the gRPC server listens instead of the port (default: none)",
    )
    listening_options.add_http(server)
    server.add_argument("--no-http", action="store_true", help="serve gRPC only")
    listening_options.add_tls(server)
    server.add_argument(
        "--tokens-file",
        type=Path,
        metavar="FILE",
        help="require one of the access tokens in this file, which `mpt-grpc token new` makes; read again when it"
        " changes (default: none)",
    )
    server.add_argument("--no-reflection", action="store_true", help="serve no description of the API over gRPC")
    listening_options.add_timeouts(server)
    server.add_argument(
        "--stall-timeout",
        type=seconds,
        default="120s",
        metavar="TIME",
        help="report NOT_SERVING when requests are pending and no step has completed for this long",
    )
    server.add_argument(
        "--max-connection-age",
        type=seconds,
        metavar="TIME",
        help="give gRPC connections older than this no new calls, so that clients connect again and find servers that"
        " were added; calls in progress continue (default: no limit)",
    )
    server.add_argument(
        "--guard",
        action="append",
        metavar="NAME[=ARGUMENT]",
        help="check prompts and outputs with this guard; words=FILE blocks the words listed in a file; may be repeated"
        " (default: none)",
    )


def _add_telemetry(telemetry: argparse._ArgumentGroup) -> None:
    """Adds the log, and what else is recorded."""
    add_log(telemetry)
    telemetry.add_argument(
        "--metrics-port",
        type=int,
        metavar="N",
        help="port on which only /metrics is served, which the HTTP port also has; 0 selects a free port (default:"
        " none)",
    )
    telemetry.add_argument(
        "--channelz-port",
        type=int,
        metavar="N",
        help="port on which programs on this machine read gRPC's channelz: its connections and their calls; 0 selects a"
        " free port (default: none)",
    )
    telemetry.add_argument(
        "--trace-file",
        type=Path,
        metavar="FILE",
        help="append spans to this file as JSON lines; OTEL_EXPORTER_OTLP_ENDPOINT exports them over OTLP (default: no"
        " tracing)",
    )
    telemetry.add_argument(
        "--trace-steps",
        type=int,
        metavar="N",
        help="trace one in N steps of the engine, with links to its requests (default: none)",
    )


def settings(parsed: argparse.Namespace) -> Settings:
    """Returns the settings given by the flags. Raises SettingsError."""
    return Settings(
        model=replace(
            model_settings(parsed),
            load_format=parsed.load_format,
            max_context_tokens=parsed.max_context_tokens,
            generation_config=parsed.generation_config,
        ),
        cache=CacheSettings(
            kv_cache_dtype=parsed.kv_cache_dtype,
            kv_cache_bytes=parsed.kv_cache,
            memory_fraction=parsed.memory_fraction,
            memory_limit_bytes=parsed.memory_limit,
        ),
        scheduler=SchedulerSettings(
            max_running_requests=parsed.max_running_requests,
            max_waiting_requests=parsed.max_waiting_requests,
            max_step_tokens=parsed.max_step_tokens,
            prefill_slowdown=parsed.prefill_slowdown,
            speculate=parsed.speculate,
        ),
        server=ServerSettings(
            host=parsed.host,
            grpc_port=parsed.grpc_port,
            grpc_socket=parsed.grpc_socket,
            tls=listening_options.tls_settings(parsed),
            tokens_file=parsed.tokens_file,
            reflection=not parsed.no_reflection,
            grace_s=parsed.grace,
            read_timeout_s=parsed.read_timeout,
            stall_timeout_s=parsed.stall_timeout,
            max_connection_age_s=parsed.max_connection_age,
        ),
        http=listening_options.http_settings(parsed, port=None if parsed.no_http else parsed.http_port),
        guards=tuple(parsed.guard or ()),
        telemetry=TelemetrySettings(
            metrics_port=parsed.metrics_port,
            channelz_port=parsed.channelz_port,
            trace_file=parsed.trace_file,
            trace_steps=parsed.trace_steps,
        ),
    )
