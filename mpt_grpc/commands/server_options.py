"""The flags of a server, and their way into its settings."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpt_grpc.settings import CacheSettings, HttpSettings, ModelSettings, SchedulerSettings, ServerSettings, Settings


def add_model(serve: argparse.ArgumentParser) -> None:
    """Adds which model is served, and how."""
    defaults = ModelSettings()
    model = serve.add_argument_group("model")
    model.add_argument("--model", default=defaults.model, help="'demo', a folder in Hugging Face's layout, or a hub id")
    model.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "float16", "bfloat16", "float32"),
        default="auto",
        help="auto takes float16 on a GPU, bfloat16 on a CPU that computes it, float32 on others",
    )
    model.add_argument(
        "--load-format",
        choices=("auto", "random"),
        default="auto",
        help="random fills the model's shape with random weights; the folder needs no weights then",
    )
    model.add_argument(
        "--max-context-tokens",
        type=int,
        metavar="N",
        help="the most tokens of one request; ALiBi allows more than the model's own limit (default: its own)",
    )
    model.add_argument(
        "--chat-template",
        default=defaults.chat_template,
        metavar="NAME|FILE",
        help="base, instruct, chatml or a Jinja file; auto takes the model's own, else goes by its name",
    )


def add_scheduling(serve: argparse.ArgumentParser) -> None:
    """Adds how much memory and how many requests there may be."""
    defaults = Settings()
    memory = serve.add_argument_group("memory and scheduling")
    memory.add_argument(
        "--kv-cache-gib",
        type=float,
        metavar="GIB",
        help="size of the KV cache (default: 1 on a CPU; on a GPU what the weights leave of --memory-fraction)",
    )
    memory.add_argument(
        "--memory-fraction",
        type=float,
        default=defaults.cache.memory_fraction,
        metavar="F",
        help="share of a GPU's memory for weights and cache",
    )
    memory.add_argument(
        "--max-running-requests",
        type=int,
        default=defaults.scheduler.max_running_requests,
        metavar="N",
        help="requests in one batch",
    )
    memory.add_argument(
        "--max-waiting-requests",
        type=int,
        default=defaults.scheduler.max_waiting_requests,
        metavar="N",
        help="requests that queue; the next is refused with RESOURCE_EXHAUSTED",
    )
    memory.add_argument(
        "--max-step-tokens",
        type=int,
        default=defaults.scheduler.max_step_tokens,
        metavar="N",
        help="tokens that one step computes; longer prompts are computed in chunks",
    )


def add_server(serve: argparse.ArgumentParser) -> None:
    """Adds where the server listens and how it is watched."""
    defaults = Settings()
    server = serve.add_argument_group("server")
    server.add_argument("--port", type=int, default=defaults.server.port, metavar="N", help="0 takes a free one")
    add_http(server)
    server.add_argument("--no-http", action="store_true", help="serve gRPC alone")
    add_grace(server)
    server.add_argument(
        "--stall-timeout-s",
        type=float,
        default=defaults.server.stall_timeout_s,
        metavar="S",
        help="health says NOT_SERVING when work waits and nothing has come of it for so many seconds",
    )
    server.add_argument(
        "--trace-file",
        type=Path,
        metavar="FILE",
        help="append spans as JSON lines; OTEL_EXPORTER_OTLP_ENDPOINT sends them by OTLP (default: no tracing)",
    )
    server.add_argument(
        "--guard",
        action="append",
        metavar="NAME[=ARGUMENT]",
        help="watch prompts and outputs; words=FILE lists what may not be said; may be repeated (default: none)",
    )


def add_http(parser: argparse._ActionsContainer) -> None:
    """Adds where OpenAI's API is served."""
    parser.add_argument(
        "--host",
        default=ServerSettings().host,
        help="address to listen on; 0.0.0.0 for all, without authentication",
    )
    parser.add_argument(
        "--http-port",
        type=int,
        default=HttpSettings().port,
        metavar="N",
        help="port of OpenAI's API and the page; 0 takes a free one",
    )
    parser.add_argument(
        "--strict-model-names",
        action="store_true",
        help="refuse HTTP requests that name another model than the loaded one, instead of answering them by it",
    )


def add_grace(parser: argparse._ActionsContainer) -> None:
    """Adds how long the end may take."""
    parser.add_argument(
        "--grace-s",
        type=float,
        default=ServerSettings().grace_s,
        metavar="S",
        help="seconds that running requests have to finish after SIGTERM",
    )


def settings(parsed: argparse.Namespace) -> Settings:
    """What the flags of `serve` say. Raises SettingsError."""
    return Settings(
        model=ModelSettings(
            model=parsed.model,
            device=parsed.device,
            dtype=parsed.dtype,
            load_format=parsed.load_format,
            max_context_tokens=parsed.max_context_tokens,
            chat_template=parsed.chat_template,
        ),
        cache=CacheSettings(kv_cache_gib=parsed.kv_cache_gib, memory_fraction=parsed.memory_fraction),
        scheduler=SchedulerSettings(
            max_running_requests=parsed.max_running_requests,
            max_waiting_requests=parsed.max_waiting_requests,
            max_step_tokens=parsed.max_step_tokens,
        ),
        server=ServerSettings(
            host=parsed.host, port=parsed.port, grace_s=parsed.grace_s, stall_timeout_s=parsed.stall_timeout_s
        ),
        http=HttpSettings(
            port=None if parsed.no_http else parsed.http_port, strict_model_names=parsed.strict_model_names
        ),
        guards=tuple(parsed.guard or ()),
        trace_file=parsed.trace_file,
    )
