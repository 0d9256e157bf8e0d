"""The command line: the only reader of argv.

`serve` runs the server, `gateway` OpenAI's API in front of one, and the other commands call one. What they run is
imported when they run, so that `--help` waits for neither torch nor grpc.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from mpt_grpc import __version__
from mpt_grpc.commands import options
from mpt_grpc.errors import EvaluationError, ModelError, SettingsError
from mpt_grpc.settings import CacheSettings, HttpSettings, ModelSettings, SchedulerSettings, ServerSettings, Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 for what failed, 2 for bad arguments, 130 after Ctrl-C."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.command == "serve":
        return _serve(parsed)
    if parsed.command == "generate" and parsed.prompt is None and sys.stdin.isatty():
        parser.error("generate: give a prompt, or pipe one in")
    return _call(parsed)


def _serve(parsed: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # gRPC's core says in its own words on stderr what is said here in one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # A caller who leaves in mid-send is no error; what fails in a method is logged by our interceptor.
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    # Until the server is ready Ctrl-C ends it at once; from then on it drains.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        settings = _settings(parsed)
        from mpt_grpc.server.server import serve
        from mpt_grpc.server.welcome import welcome

        asyncio.run(serve(settings, lambda server: print(welcome(server), flush=True)))
    except (ModelError, SettingsError) as error:
        print(f"mpt-grpc: {error}", file=sys.stderr)
        return 1
    return 0


def _call(parsed: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from mpt_grpc_client import MptGrpcError

    try:
        importlib.import_module(f"mpt_grpc.commands.{parsed.command}").run(parsed)
        sys.stdout.flush()
    except (MptGrpcError, EvaluationError, SettingsError) as error:
        print(f"mpt-grpc: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who reads has had enough. Python would try to flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _settings(parsed: argparse.Namespace) -> Settings:
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


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends each default, but not None, which the help puts in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpt-grpc",
        description="Serve the MPT family of language models over gRPC, or call such a server.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mpt-grpc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model until SIGTERM",
        description="Serve a model until SIGTERM, then let running requests finish.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    _add_model(serve)
    _add_scheduling(serve)
    _add_server(serve)

    gateway = commands.add_parser(
        "gateway",
        help="serve OpenAI's API for a gRPC server elsewhere",
        description="Serve OpenAI's API and the page for a gRPC server elsewhere, until SIGTERM.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    gateway.add_argument(
        "--target", metavar="HOST:PORT", help="the gRPC server (default: MPT_GRPC_TARGET, or localhost:50051)"
    )
    _add_http(gateway)
    _add_grace(gateway)

    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt and print the text as it comes.",
        allow_abbrev=False,
    )
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="'-' or none reads it from standard input")
    chat = commands.add_parser(
        "chat",
        help="talk with the model",
        description="Talk with the model; each line is a turn. Ctrl-C stops an answer, Ctrl-D leaves.",
        allow_abbrev=False,
    )
    chat.add_argument("--system", default="", metavar="TEXT", help="what sets the scene (default: the template's)")
    for command in (generate, chat):
        options.add_sampling(command)
        options.add_stopping(command)
        options.add_target(command)
    options.add_constraint(generate)
    options.add_request(generate)

    evaluation = commands.add_parser(
        "eval",
        help="measure how good the model is",
        description="Measure how good a served model is, with lm-eval's tasks, and print a table.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    _add_evaluation(evaluation)
    return parser


def _add_model(serve: argparse.ArgumentParser) -> None:
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


def _add_scheduling(serve: argparse.ArgumentParser) -> None:
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


def _add_server(serve: argparse.ArgumentParser) -> None:
    defaults = Settings()
    server = serve.add_argument_group("server")
    server.add_argument("--port", type=int, default=defaults.server.port, metavar="N", help="0 takes a free one")
    _add_http(server)
    server.add_argument("--no-http", action="store_true", help="serve gRPC alone")
    _add_grace(server)
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


def _add_evaluation(evaluation: argparse.ArgumentParser) -> None:
    evaluation.add_argument(
        "--url", default=f"http://localhost:{HttpSettings().port}/v1", help="OpenAI's API of the server"
    )
    evaluation.add_argument(
        "--tasks",
        type=lambda names: names.split(","),
        metavar="NAME,NAME,…",
        help="tasks of lm-eval, which may download their data; story_endings is built in (default: story_endings,"
        " or none with --text)",
    )
    evaluation.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="measure bits per byte of a text; <|endoftext|> stands between documents (default: none)",
    )
    evaluation.add_argument("--limit", type=_count, metavar="N", help="only the first N of each task (default: all)")
    evaluation.add_argument("--num-concurrent", type=_count, default=8, metavar="N", help="requests in flight")
    evaluation.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _add_http(parser: argparse._ActionsContainer) -> None:
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


def _add_grace(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--grace-s",
        type=float,
        default=ServerSettings().grace_s,
        metavar="S",
        help="seconds that running requests have to finish after SIGTERM",
    )


if __name__ == "__main__":
    sys.exit(main())
