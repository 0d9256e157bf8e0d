"""The command line, the only module that reads argv.

`serve` runs the server, `gateway` runs the OpenAI-compatible API in front of a server, and the other commands are
clients. A command's implementation is imported when it runs, so that `--help` waits for neither torch nor grpc.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from mpt_grpc import __version__
from mpt_grpc.commands import bench_options, connection, listening_options, model_options, options, server_options
from mpt_grpc.commands.logs import add_log, configure
from mpt_grpc.commands.units import positive_int, seconds
from mpt_grpc.errors import MptServerError
from mpt_grpc.settings import HttpSettings
from mpt_grpc.telemetry import variables


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; docs/cli.md lists them."""
    parser = _parser()
    parsed, unknown = parser.parse_known_args(arguments)
    command: _Parser = parsed.parser
    if unknown:
        command.error(_unknown_arguments(command, unknown))
    if parsed.command == "generate" and parsed.prompt is None and sys.stdin.isatty():
        command.error("no prompt: pass it as an argument or pipe it to standard input")
    usage_error = bench_options.usage_error if parsed.command == "bench" else options.usage_error
    if problem := usage_error(parsed) or connection.usage_error(parsed):
        command.error(problem)
    return _run(parsed)


def _run(parsed: argparse.Namespace) -> int:
    # gRPC's core would repeat on stderr what is reported here in one line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    variables.remove_empty()
    if problem := variables.problem(is_server=parsed.command in ("serve", "gateway")):
        return _fail(parsed, problem)
    from mpt_grpc_client import DeadlineExceededError, InvalidRequestError, InvalidTargetError, MptGrpcError

    if isinstance(sys.stdin, io.TextIOWrapper):
        # In some locales Python would decode invalid bytes to surrogates.
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        importlib.import_module(f"mpt_grpc.commands.{parsed.command}").run(parsed)
        if sys.stdout is not None:  # as it is if the shell closed it
            sys.stdout.flush()
    except InvalidRequestError as error:
        violations = [f"{options.flag(v.field, parsed)}: {v.description}" for v in error.violations]
        return _fail(parsed, "; ".join(violations) or str(error))
    except InvalidTargetError as error:
        return _fail(parsed, str(error).replace("allow_insecure_token", "--allow-insecure-token"))
    except DeadlineExceededError as error:
        return _fail(parsed, str(error).replace("the client's timeout", "--timeout"))
    except (MptGrpcError, MptServerError) as error:
        return _fail(parsed, str(error))
    except UnicodeDecodeError as error:
        return _fail(parsed, f"standard input is not UTF-8: {error}")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()
    except OSError as error:  # such as a full disk
        _discard_output()
        return _fail(parsed, f"{error.filename or 'standard output'}: {error.strerror or error}")
    return 0


def _discard_output() -> None:
    """Discards what is left to print: Python would try to flush it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(parsed: argparse.Namespace, message: str) -> int:
    if getattr(parsed, "log_format", "") == "json":
        configure(parsed.log_level, parsed.log_format)
        logging.getLogger("mpt_grpc").error("%s", message)
    else:
        print(f"mpt-grpc: {message}", file=sys.stderr)
    return 1


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the list of all flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def option_strings(self) -> Iterator[str]:
        for action in self._actions:
            yield from action.option_strings


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the defaults that the help does not describe in words: those that are not None or empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


def _unknown_arguments(parser: _Parser, unknown: Sequence[str]) -> str:
    """Returns the error for arguments that the parser does not have, with the closest flags."""
    flag = unknown[0].partition("=")[0]
    closest = get_close_matches(flag, parser.option_strings(), n=2)
    hint = f" (did you mean {' or '.join(closest)}?)" if closest else ""
    if not flag.startswith("-"):
        hint = " (put quotes around text of several words)"
    return f"unknown argument {unknown[0]}{hint}"


def _parser() -> _Parser:
    parser = _Parser(
        prog="mpt-grpc", description="Serve MPT language models over gRPC, or call such a server.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mpt-grpc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help_: str, description: str) -> _Parser:
        command = commands.add_parser(
            name, help=help_, description=description, formatter_class=_HelpFormatter, allow_abbrev=False
        )
        command.set_defaults(parser=command)
        return command

    serve = add(
        "serve",
        "serve a model",
        "Serve a model until SIGTERM, then let requests in progress finish.",
    )
    server_options.add_flags(serve)

    gateway = add(
        "gateway",
        "serve the OpenAI-compatible API for a gRPC server running elsewhere",
        "Serve the OpenAI-compatible API and the web page for a gRPC server running elsewhere, until SIGTERM.",
    )
    connection.add_connection(gateway)
    listening_options.add_http(gateway)
    listening_options.add_tls(gateway)
    listening_options.add_timeouts(gateway)
    add_log(gateway)

    generate = add("generate", "continue a prompt", "Continue a prompt and print the text as it is generated.")
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="omit or pass '-' to read standard input")
    chat = add(
        "chat", "chat with the model", "Chat with the model. Ctrl-C stops a reply; each line of a pipe is a message."
    )
    chat.add_argument("--system", default="", metavar="TEXT", help="system message (default: the template's)")
    for command in (generate, chat):
        options.add_sampling(command)
        options.add_stopping(command)
        options.add_target(command)
    options.add_constraint(generate)
    options.add_request(generate)

    batch = add(
        "batch",
        "respond to a file of requests",
        "Send the requests in a file of OpenAI's Batch API to a server, at the lowest priority, and add the responses"
        " to another file. A run that was interrupted continues with the same command. The exit status is 1 if a"
        " request fails.",
    )
    _add_batch(batch)

    verify = add(
        "verify",
        "check that a checkpoint is served correctly",
        "Check a checkpoint's files, and compare its tokens, chat template and log probabilities with transformers and"
        " a float64 reference. The exit status is 1 if something differs.",
    )
    model_options.add_model(verify)

    evaluation = add(
        "eval",
        "measure the quality of the model",
        "Measure the quality of a served model with the tasks of lm-eval, and print a table.",
    )
    _add_evaluation(evaluation)

    token = add(
        "token",
        "make an access token",
        "Make an access token for a server with --tokens-file. Its entry in that file, which has only its hash, is"
        " printed to standard output, and the token itself, once, to standard error.",
    )
    _add_token(token)

    top = add(
        "top",
        "show what a server is doing",
        "Show the load of a server and its oldest requests, until Ctrl-C, or once if the output is not a terminal. With"
        " access tokens, that in MPT_GRPC_TOKEN needs the role observe.",
    )
    connection.add_connection(top)
    top.add_argument(
        "--interval", type=seconds, default="1s", metavar="TIME", help="time from one measurement to the next"
    )
    top.add_argument("--rows", type=positive_int, default=10, metavar="N", help="maximum requests in the list")
    top.add_argument("--once", action="store_true", help="print one measurement and exit")

    trace = add("trace", "show a trace", "Show a trace in a file of `serve --trace-file` as bars over time.")
    trace.add_argument("action", choices=("show",), metavar="show", help="show a trace")
    trace.add_argument("file", metavar="FILE", help="the file; '-' for standard input")
    trace.add_argument(
        "trace_id", nargs="?", metavar="TRACE_ID", help="the beginning of its ID (default: the last one of a request)"
    )

    bench = add(
        "bench",
        "measure latency and throughput",
        "Measure the latency and the throughput of a server under load, and print a table. Ctrl-C ends the run with the"
        " results so far.",
    )
    bench_options.add_flags(bench)

    completion = add(
        "completion",
        "print completions for a shell",
        "Print a script that completes commands and flags of mpt-grpc in a shell. It requires the extra completion.",
    )
    completion.add_argument("shell", choices=("bash", "zsh"), help="the shell")
    completion.set_defaults(root=parser)
    return parser


def _add_batch(batch: argparse.ArgumentParser) -> None:
    batch.add_argument(
        "input", metavar="INPUT_FILE", help="the requests, one JSON object a line; '-' for standard input"
    )
    batch.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUTPUT_FILE",
        help="where to add the responses, one JSON object a line; '-' for standard output",
    )
    batch.add_argument("--concurrency", type=positive_int, default=32, metavar="N", help="requests in progress at once")
    connection.add_connection(batch)


def _add_token(token: argparse.ArgumentParser) -> None:
    token.add_argument("action", choices=("new",), metavar="new", help="make a token")
    token.add_argument("name", metavar="NAME", help="name of the caller, which may have several tokens")
    token.add_argument(
        "--role",
        choices=("generate", "observe", "admin"),
        action="append",
        help="what the caller may do; may be repeated (default: generate)",
    )
    token.add_argument(
        "--days", type=positive_int, metavar="N", help="days until the token expires (default: it never does)"
    )


def _add_evaluation(evaluation: argparse.ArgumentParser) -> None:
    evaluation.add_argument(
        "--url",
        default=f"http://localhost:{HttpSettings().port}/v1",
        help="the server's OpenAI-compatible API; OPENAI_API_KEY is sent if it is set",
    )
    evaluation.add_argument(
        "--tasks",
        type=lambda names: names.split(","),
        metavar="NAME,NAME,...",
        help="tasks of lm-eval, some of which download data; story_endings is built in (default: story_endings, or none"
        " with --text)",
    )
    evaluation.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="measure the bits per byte of a text; <|endoftext|> separates documents (default: none)",
    )
    evaluation.add_argument("--limit", type=positive_int, metavar="N", help="examples of each task (default: all)")
    evaluation.add_argument("--num-concurrent", type=positive_int, default=8, metavar="N", help="concurrent requests")
    evaluation.add_argument("--json", action="store_true", help="print JSON instead of a table")


if __name__ == "__main__":
    sys.exit(main())
