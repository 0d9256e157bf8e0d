"""The flags of a generation, one for each option of the client library, and their translation into its arguments.

Imported to build the parser, even for `--help`, so grpc is imported only where a request is made.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mpt_grpc.commands.connection import add_connection
from mpt_grpc.commands.units import seconds
from mpt_grpc.json_values import parse_json

if TYPE_CHECKING:
    from mpt_grpc_client import Constraint, GenerateOptions

_CONSTRAINTS = ("json_schema", "json_object", "regex", "choice", "lark_grammar")
_JSON_ONLY = (
    "return_token_ids",
    "return_prompt_token_ids",
    "return_logprobs",
    "return_prompt_logprobs",
    "top_logprobs",
)


def add_target(parser: argparse.ArgumentParser) -> None:
    """Adds the address of the server and the options of a call."""
    server = parser.add_argument_group("server")
    add_connection(server)
    server.add_argument(
        "--timeout", type=seconds, metavar="TIME", help="timeout of a call, such as 60s (default: none)"
    )
    server.add_argument("--model", metavar="NAME", help="name of the model (default: the loaded one)")
    server.add_argument("--priority", type=int, metavar="N", help="higher runs first; -100 to 100 (default: 0)")
    server.add_argument(
        "--cache-bypass", action="store_const", const=True, help="neither read nor write the prefix cache"
    )
    server.add_argument(
        "--cache-salt", metavar="TEXT", help="share the prefix cache only with requests that have this salt"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds how the next token is sampled."""
    sampling = parser.add_argument_group("sampling")
    for name, kind, what in (
        ("--temperature", float, "0 selects greedy decoding; 0 to 100 (default: 1)"),
        ("--top-k", int, "keep the k most likely tokens (default: 0, all)"),
        ("--top-p", float, "keep the most likely tokens with this total probability (default: 1, all)"),
        ("--min-p", float, "remove tokens below this fraction of the most likely one (default: 0)"),
        ("--typical-p", float, "keep the most typical tokens with this total probability (default: 1, all)"),
        ("--seed", int, "seed for reproducible outputs (default: random)"),
        (
            "--repetition-penalty",
            float,
            "penalize tokens in the prompt or the output; above 0, up to 10 (default: 1, none)",
        ),
        ("--frequency-penalty", float, "penalize tokens for each occurrence in the output; -2 to 2 (default: 0)"),
        ("--presence-penalty", float, "penalize tokens that occur in the output; -2 to 2 (default: 0)"),
    ):
        sampling.add_argument(name, type=kind, metavar="N" if kind is int else "X", help=what)
    sampling.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        metavar="ID=X",
        help="add X to the logit of token ID; may be repeated",
    )
    sampling.add_argument(
        "--allowed-token-ids", type=_ids, metavar="ID,ID,...", help="restrict the output to these tokens"
    )


def add_stopping(parser: argparse.ArgumentParser) -> None:
    """Adds when the output ends."""
    stopping = parser.add_argument_group("stopping")
    stopping.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="maximum number of new tokens (default: 256, or what fits)"
    )
    stopping.add_argument("--min-new-tokens", type=int, metavar="N", help="minimum number of new tokens (default: 0)")
    stopping.add_argument(
        "--stop-strings",
        type=_unescaped,
        action="append",
        metavar="TEXT",
        help=r"end before this text, in which \n is a line break and \t a tab; may be repeated",
    )
    stopping.add_argument("--stop-token-ids", type=_ids, metavar="ID,ID,...", help="end at any of these tokens")
    stopping.add_argument(
        "--include-stop-string", action="store_const", const=True, help="include the stop string in the text"
    )
    stopping.add_argument(
        "--ignore-eos", action="store_const", const=True, help="continue past the end-of-sequence token"
    )
    stopping.add_argument(
        "--time-limit", type=seconds, metavar="TIME", help="return the partial output after this time, such as 2.5s"
    )
    stopping.add_argument(
        "--repetition-guard",
        type=_one_or_two,
        nargs="?",
        const=(),
        metavar="REPEATS[,CYCLE]",
        help="end an output that repeats itself (default: off; without a value, 4 repeats of up to 32 tokens)",
    )


def add_constraint(parser: argparse.ArgumentParser) -> None:
    """Adds constraints on the output."""
    group = parser.add_argument_group("constraint on the output")
    constraint = group.add_mutually_exclusive_group()
    constraint.add_argument(
        "--json-schema", type=_schema, metavar="JSON|FILE", help="JSON that conforms to this schema"
    )
    constraint.add_argument("--json-object", action="store_true", help="any JSON object")
    constraint.add_argument("--regex", metavar="PATTERN", help="text that matches this pattern")
    constraint.add_argument("--choice", action="append", metavar="TEXT", help="one of these texts; may be repeated")
    constraint.add_argument("--lark-grammar", type=_grammar, metavar="TEXT|FILE", help="a sentence of this grammar")
    group.add_argument(
        "--max-whitespace",
        type=int,
        metavar="N",
        help="most whitespace between elements of JSON; 0 to 8 (default: one space after each comma and colon)",
    )


def add_request(parser: argparse.ArgumentParser) -> None:
    """Adds the remaining options of a request, and the format of the result."""
    request = parser.add_argument_group("request")
    request.add_argument("--num-sequences", type=int, metavar="N", help="number of outputs; 1 to 16 (default: 1)")
    request.add_argument("--truncate-prompt-tokens", type=int, metavar="N", help="keep only the last N prompt tokens")
    request.add_argument("--resume-token-ids", type=_ids, metavar="ID,ID,...", help="resume a partial output")
    request.add_argument(
        "--request-id", metavar="NAME", help="identifies the request in traces and logs (default: generated)"
    )

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print the complete result as one JSON object")
    output.add_argument(
        "--skip-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="omit special tokens from the text (default: yes)",
    )
    output.add_argument(
        "--chunk-tokens", type=int, metavar="N", help="print N tokens at a time; 1 to 1024 (default: 1)"
    )
    output.add_argument(
        "--chunk-interval", type=seconds, metavar="TIME", help="print new tokens at most this often, such as 100ms"
    )
    for flag, what in (
        ("--return-token-ids", "token IDs of the output"),
        ("--return-prompt-token-ids", "token IDs of the prompt"),
        ("--return-logprobs", "log probabilities of the output tokens"),
        ("--return-prompt-logprobs", "log probabilities of the prompt tokens"),
    ):
        output.add_argument(flag, action="store_const", const=True, help=f"include the {what}; requires --json")
    output.add_argument(
        "--top-logprobs",
        type=int,
        metavar="N",
        help="include the N most likely tokens at each position; 0 to 20; requires --json",
    )


def usage_error(parsed: argparse.Namespace) -> str | None:
    """Returns the error of a combination of flags that is not valid, or None."""
    without_effect = [name for name in _JSON_ONLY if getattr(parsed, name, None) is not None]
    if without_effect and not parsed.json:
        return f"argument --{without_effect[0].replace('_', '-')}: requires --json"
    return None


def flag(field: str, parsed: argparse.Namespace) -> str:
    """Returns the flag that sets an option of the client library."""
    if field.startswith("prompt"):
        return field
    if field.startswith("constraint"):
        given = [name for name in _CONSTRAINTS if getattr(parsed, name, None)]
        field = (given[0] if given else "constraint") + field.removeprefix("constraint")
    name, bracket, index = field.partition("[")
    return f"--{name.replace('_', '-')}{bracket}{index}"


def generate_options(parsed: argparse.Namespace) -> GenerateOptions:
    """Returns the flags that were given as the client's keyword arguments."""
    from mpt_grpc_client import GenerateOptions, RepetitionGuard

    given: dict[str, Any] = {
        name: value
        for name, value in vars(parsed).items()
        if name in GenerateOptions.__optional_keys__ and value is not None
    }
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    if "repetition_guard" in given:
        given["repetition_guard"] = RepetitionGuard(*given["repetition_guard"])
    if (constraint := _constraint(parsed)) is not None:
        given["constraint"] = constraint
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


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers") from error


def _one_or_two(text: str) -> tuple[int, ...]:
    numbers = _ids(text)
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} has more than two numbers")
    return numbers


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=NUMBER, such as 50=-2.5") from error


def _unescaped(text: str) -> str:
    return text.replace(r"\n", "\n").replace(r"\t", "\t")


def _schema(text: str) -> str:
    schema = text if text.lstrip().startswith("{") or text in ("true", "false") else _content(text)
    try:
        parse_json(schema)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else f"not valid JSON: {error}"
        raise argparse.ArgumentTypeError(f"{text}: {why}") from error
    return schema


def _grammar(text: str) -> str:
    return text if ":" in text else _content(text)  # every rule has a colon


def _content(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "the file is not valid UTF-8"
        raise argparse.ArgumentTypeError(f"{file}: {why}") from error
