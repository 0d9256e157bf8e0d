"""The flags of a generation: one for each option of the client library, and their way into its keyword arguments.

Imported to make a parser, also for `--help`, so grpc is imported only where a request is made.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mpt_grpc_client import Constraint, GenerateOptions, RepetitionGuard


def add_target(parser: argparse.ArgumentParser) -> None:
    """Adds where the server is and how long a call may take."""
    server = parser.add_argument_group("server")
    server.add_argument(
        "--target", metavar="HOST:PORT", help="the server (default: MPT_GRPC_TARGET, or localhost:50051)"
    )
    server.add_argument("--timeout-s", type=float, metavar="S", help="deadline of a call (default: none)")
    server.add_argument("--model", metavar="NAME", help="the model that has to answer (default: whichever is loaded)")
    server.add_argument("--priority", type=int, metavar="N", help="higher goes first; -100 to 100 (default: 0)")
    server.add_argument("--cache-bypass", action="store_true", help="neither read nor fill the prefix cache")
    server.add_argument("--cache-salt", metavar="TEXT", help="share the prefix cache only with this salt")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds how a token is chosen."""
    sampling = parser.add_argument_group("how a token is chosen")
    for name, kind, what in (
        ("--temperature", float, "0 takes the best token; 0 to 100 (default: 1)"),
        ("--top-k", int, "keep the k likeliest tokens (default: 0, all)"),
        ("--top-p", float, "keep the fewest likeliest tokens that reach this probability (default: 1, all)"),
        ("--min-p", float, "drop tokens less likely than this share of the likeliest (default: 0, none)"),
        ("--typical-p", float, "keep the most typical tokens that reach this probability (default: 1, all)"),
        ("--seed", int, "the same request with the same seed gives the same tokens (default: drawn)"),
        ("--repetition-penalty", float, "above 0 to 10 (default: 1, none)"),
        ("--frequency-penalty", float, "-2 to 2 (default: 0)"),
        ("--presence-penalty", float, "-2 to 2 (default: 0)"),
    ):
        sampling.add_argument(name, type=kind, metavar="N" if kind is int else "X", help=what)
    sampling.add_argument(
        "--logit-bias", type=_bias, action="append", metavar="ID=X", help="add to a token's score; may be repeated"
    )
    sampling.add_argument("--allowed-token-ids", type=_ids, metavar="ID,ID,…", help="choose only these tokens")


def add_stopping(parser: argparse.ArgumentParser) -> None:
    """Adds when an output ends."""
    stopping = parser.add_argument_group("when an output ends")
    stopping.add_argument("--max-new-tokens", type=int, metavar="N", help="(default: 256, or what fits)")
    stopping.add_argument("--min-new-tokens", type=int, metavar="N", help="no end before (default: 0)")
    stopping.add_argument(
        "--stop", type=_unescaped, action="append", metavar="TEXT", help=r"end before it; \n is a line end; repeatable"
    )
    stopping.add_argument("--stop-token-ids", type=_ids, metavar="ID,ID,…", help="end at one of these tokens")
    stopping.add_argument("--include-stop-string", action="store_true", help="end behind the stop string instead")
    stopping.add_argument("--ignore-eos", action="store_true", help="go on after the model's end mark")
    stopping.add_argument("--time-limit-s", type=float, metavar="S", help="end with what there is after S seconds")
    stopping.add_argument(
        "--repetition-guard",
        type=_one_or_two,
        nargs="?",
        const=(),
        metavar="REPEATS[,CYCLE]",
        help="end an output that goes in circles (default: off; 4 times a cycle of up to 32 tokens)",
    )


def add_constraint(parser: argparse.ArgumentParser) -> None:
    """Adds what an output may be."""
    constraint = parser.add_argument_group("what an output may be").add_mutually_exclusive_group()
    constraint.add_argument("--json-schema", type=_schema, metavar="JSON|FILE", help="JSON of this schema")
    constraint.add_argument("--json-object", action="store_true", help="any JSON object")
    constraint.add_argument("--regex", metavar="PATTERN", help="a match of this pattern")
    constraint.add_argument("--choice", action="append", metavar="TEXT", help="one of these; repeatable")
    constraint.add_argument("--lark-grammar", type=_grammar, metavar="TEXT|FILE", help="a sentence of a grammar")


def add_request(parser: argparse.ArgumentParser) -> None:
    """Adds what concerns one request and its answer."""
    request = parser.add_argument_group("the request")
    request.add_argument("--num-sequences", type=int, metavar="N", help="so many outputs; 1 to 16 (default: 1)")
    request.add_argument("--truncate-prompt-tokens", type=int, metavar="N", help="use the prompt's last N tokens")
    request.add_argument("--resume-token-ids", type=_ids, metavar="ID,ID,…", help="go on after these tokens")
    request.add_argument("--request-id", metavar="NAME", help="names it in traces and logs (default: made up)")
    request.add_argument("--keep-special-tokens", action="store_true", help="leave special tokens in the text")

    answer = parser.add_argument_group("the answer")
    answer.add_argument("--json", action="store_true", help="print the whole answer as one JSON object")
    for flag, what in (
        ("--return-token-ids", "the output's token ids"),
        ("--return-prompt-token-ids", "the prompt's token ids"),
        ("--return-logprobs", "log probabilities of the output's tokens"),
        ("--return-prompt-logprobs", "log probabilities of the prompt's tokens"),
    ):
        answer.add_argument(flag, action="store_true", help=f"{what}, with --json")
    answer.add_argument("--top-logprobs", type=int, metavar="N", help="with each the N likeliest tokens; 0 to 20")


def generate_options(parsed: argparse.Namespace) -> GenerateOptions:
    """The flags that were given, as the client's keyword arguments."""
    from mpt_grpc_client import GenerateOptions

    given: dict[str, Any] = {
        name: value
        for name, value in vars(parsed).items()
        if name in GenerateOptions.__optional_keys__ and value is not None and value is not False
    }
    if given.get("logit_bias"):
        given["logit_bias"] = dict(given["logit_bias"])
    if "repetition_guard" in given:
        given["repetition_guard"] = _repetition_guard(given["repetition_guard"])
    if (constraint := _constraint(parsed)) is not None:
        given["constraint"] = constraint
    if getattr(parsed, "keep_special_tokens", False):
        given["skip_special_tokens"] = False
    return cast(GenerateOptions, given)


def _constraint(parsed: argparse.Namespace) -> Constraint | None:
    from mpt_grpc_client import Choice, JsonObject, JsonSchema, LarkGrammar, Regex

    if "regex" not in parsed:
        return None
    if parsed.json_schema is not None:
        return JsonSchema(parsed.json_schema)
    if parsed.json_object:
        return JsonObject()
    if parsed.regex is not None:
        return Regex(parsed.regex)
    if parsed.choice is not None:
        return Choice(*parsed.choice)
    return None if parsed.lark_grammar is None else LarkGrammar(parsed.lark_grammar)


def _repetition_guard(numbers: Sequence[int]) -> RepetitionGuard:
    from mpt_grpc_client import RepetitionGuard

    return RepetitionGuard(*numbers)


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them") from error


def _one_or_two(text: str) -> tuple[int, ...]:
    numbers = _ids(text)
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text!r}: give one number or two")
    return numbers


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=NUMBER") from error


def _unescaped(text: str) -> str:
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def _schema(text: str) -> str:
    schema = text if text.lstrip().startswith("{") or text in ("true", "false") else _content(text)
    try:
        json.loads(schema)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: not JSON: {error}") from error
    return schema


def _grammar(text: str) -> str:
    return text if ":" in text else _content(text)  # as in every rule


def _content(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{file}: {getattr(error, 'strerror', error)}") from error
