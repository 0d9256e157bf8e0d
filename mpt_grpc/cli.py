"""The command line: the only reader of argv.

`serve` runs the server, `gateway` OpenAI's API in front of one, and the other commands call one. What they run is
imported when they run, so that `--help` waits for neither torch nor grpc.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mpt_grpc import __version__
from mpt_grpc.commands import options, server_options
from mpt_grpc.errors import EvaluationError, ModelError, SettingsError
from mpt_grpc.settings import HttpSettings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 for what failed, 2 for bad arguments, 130 after Ctrl-C."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.command == "generate" and parsed.prompt is None and sys.stdin.isatty():
        parser.error("generate: give a prompt, or pipe one in")
    return _run(parsed)


def _run(parsed: argparse.Namespace) -> int:
    # gRPC's core says in its own words on stderr what is said here in one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from mpt_grpc_client import MptGrpcError

    if isinstance(sys.stdin, io.TextIOWrapper):
        # In some locales Python would take other bytes for halves of characters.
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        importlib.import_module(f"mpt_grpc.commands.{parsed.command}").run(parsed)
        sys.stdout.flush()
    except (MptGrpcError, EvaluationError, ModelError, SettingsError) as error:
        print(f"mpt-grpc: {error}", file=sys.stderr)
        return 1
    except UnicodeDecodeError as error:
        print(f"mpt-grpc: standard input is not UTF-8: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Who reads has had enough. Python would try to flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, not behind the list of all flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help tells more\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends each default, but not None, which the help puts in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
    server_options.add_model(serve)
    server_options.add_scheduling(serve)
    server_options.add_server(serve)

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
    server_options.add_http(gateway)
    server_options.add_grace(gateway)

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


if __name__ == "__main__":
    sys.exit(main())
