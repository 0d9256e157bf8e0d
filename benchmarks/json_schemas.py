"""Compares which JSON Schemas the server and llguidance alone accept, and whether the JSON that they allow is valid.

The JSON Schema Test Suite says which instances of a schema are valid. JSONSchemaBench has no instances, so random
outputs are generated and validated by the `jsonschema` package. Neither needs a model.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import jsonschema
import referencing
from llguidance import LLMatcher, LLTokenizer

import mpt_grpc
from mpt_grpc.constraint import JsonSchema
from mpt_grpc.errors import InvalidRequestError
from mpt_grpc.text.constraints import ConstraintCompiler
from mpt_grpc.text.tokenizer import Tokenizer

FORMATS = "date date-time duration email hostname ipv4 ipv6 time uri uuid".split()
SUBSETS = "Glaiveai2K Github_easy Github_medium Github_hard JsonSchemaStore Kubernetes Snowplow WashingtonPost".split()
NUM_SCHEMAS, NUM_OUTPUTS, NUM_TOKENS = 60, 5, 3000
CLOSING = frozenset((b'"', b"}", b"]"))


class RefusedError(Exception):
    """The reason for which a schema is not accepted."""


class Output(Protocol):
    """An output that is constrained by a schema; the text of the token that ends it is empty."""

    def encode(self, text: str, /) -> Sequence[int]: ...
    def decode(self, token_id: int, /) -> bytes: ...
    def advance(self, token_id: int, /) -> object: ...
    def mask(self) -> bytes: ...


class ServerOutput:
    """An output that the server constrains, in tokens of the built-in model."""

    tokenizer = Tokenizer.from_folder(Path(mpt_grpc.__file__).parent / "demo")
    compiler = ConstraintCompiler(tokenizer)

    def __init__(self, schema: Any) -> None:
        text = json.dumps({True: {}, False: {"not": {}}}[schema] if isinstance(schema, bool) else schema)
        try:
            matcher = self.compiler.compile(JsonSchema(text))
        except InvalidRequestError as error:
            raise RefusedError(str(error).removeprefix("decoding.json_schema: ")) from error
        self.advance, self.mask, self.encode = matcher.advance, matcher.mask, self.tokenizer.encode

    def decode(self, token_id: int) -> bytes:
        return b"" if token_id in self.tokenizer.eos_token_ids else self.tokenizer.token_bytes(token_id)


class LlguidanceOutput:
    """An output that llguidance constrains with its defaults, in bytes."""

    tokenizer = LLTokenizer("byte")

    def __init__(self, schema: Any) -> None:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise RefusedError(matcher.get_error().split("\n")[0])
        self.advance, self.mask, self.encode = (
            matcher.consume_token,
            matcher.compute_bitmask,
            self.tokenizer.tokenize_str,
        )

    def decode(self, token_id: int) -> bytes:
        return b"" if token_id == self.tokenizer.eos_token else bytes([token_id])


ENGINES: dict[str, Callable[[Any], Output]] = {"server": ServerOutput, "llguidance alone": LlguidanceOutput}


def allowed(output: Output) -> list[int]:
    return [8 * i + bit for i, byte in enumerate(output.mask()) if byte for bit in range(8) if byte >> bit & 1]


def accepts(make: Callable[[Any], Output], schema: Any, instance: Any) -> bool:
    """Whether an instance is allowed in its own order of properties or in the schema's, compact or with spaces."""
    instances = (instance, in_order(instance, json.dumps(schema, ensure_ascii=False)))
    for value, separators in product(instances, ((",", ":"), (", ", ": "))):
        output = make(schema)
        for token_id in output.encode(json.dumps(value, ensure_ascii=False, separators=separators)):
            if token_id not in allowed(output):
                break
            output.advance(token_id)
        else:
            if any(output.decode(token_id) == b"" for token_id in allowed(output)):
                return True
    return False


def in_order(value: Any, schema: str) -> Any:
    """Returns a value with the properties in the order in which the schema's text mentions them."""
    if isinstance(value, list):
        return [in_order(item, schema) for item in value]
    if not isinstance(value, dict):
        return value
    places = {name: schema.find(json.dumps(name, ensure_ascii=False)) for name in value}
    return {name: in_order(value[name], schema) for name in sorted(value, key=lambda name: places[name] % len(schema))}


def random_output(make: Callable[[Any], Output], schema: Any, seed: int) -> bytes | None:
    """Chooses random tokens, after 40 those that close something if possible. Returns None if the output never ends."""
    rng, output, text = random.Random(seed), make(schema), b""
    for step in range(NUM_TOKENS):
        try:
            ids = allowed(output)
        except InvalidRequestError:  # it costs too much from here on
            return None
        if step > 40:
            tokens = {output.decode(token_id): token_id for token_id in ids}
            closing = [tokens[token] for token in sorted(CLOSING & tokens.keys())]
            ids = [tokens[b""]] if b"" in tokens else closing or ids
        token_id = rng.choice(ids)
        if not (token := output.decode(token_id)):
            return text
        text += token
        output.advance(token_id)
    return None


def kind(error: RefusedError) -> str:
    """Returns a reason without its place and the values in it."""
    reason = re.sub(r"^/.*?: ", "", str(error))
    return re.sub(r"(/.*/|'?\w+:\S*/\S*|'\w+'|\d+(\.\d+)?)", "…", reason)[:90]


def suite(folder: Path, make: Callable[[Any], Output], reasons: Counter[str]) -> dict[str, Counter[str]]:
    """Returns the counts for each file of the JSON Schema Test Suite, and counts the reasons of refusals."""
    draft, counts = folder / "tests/draft2020-12", {}
    for path in (*sorted(draft.glob("*.json")), *(draft / f"optional/format/{name}.json" for name in FORMATS)):
        count = counts[str(path.relative_to(draft).with_suffix(""))] = Counter[str]()
        for case in json.loads(path.read_text()):
            count["schemas"] += 1
            try:
                make(case["schema"])
            except RefusedError as error:
                reasons[kind(error)] += 1
                continue
            count["accepted"] += 1
            for test in case["tests"]:
                verdict = "valid" if test["valid"] else "invalid"
                count[verdict] += 1
                count[f"{verdict} allowed"] += accepts(make, case["schema"], test["data"])
    return counts


def bench(folder: Path, make: Callable[[Any], Output], reasons: Counter[str]) -> dict[str, Counter[str]]:
    """Returns the counts for each subset of JSONSchemaBench, and counts the reasons of refusals."""
    counts = {name: Counter[str]() for name in SUBSETS}
    for index in range(NUM_SCHEMAS):
        name, position = SUBSETS[index % len(SUBSETS)], index // len(SUBSETS)
        paths = sorted((folder / "data" / name).glob("*.json"))
        schema, count = json.loads(paths[position * len(paths) * len(SUBSETS) // NUM_SCHEMAS].read_text()), counts[name]
        count["schemas"] += 1
        try:
            make(schema)
        except RefusedError as error:
            reasons[kind(error)] += 1
            continue
        count["accepted"] += 1
        validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        for seed in range(NUM_OUTPUTS):
            text = random_output(make, schema, seed)
            verdict = "valid"
            if text is None:
                verdict = "unfinished"
            elif not validator(schema, registry=referencing.Registry()).is_valid(json.loads(text)):
                verdict = "invalid"
            count[verdict] += 1
    return counts


def table(title: str, counts: Sequence[dict[str, Counter[str]]], columns: Sequence[str]) -> None:
    """Prints the counts of each engine, one beside the other."""
    print("|", title, "|", " | ".join(f"{engine}: {column}" for engine in ENGINES for column in columns), "|")
    print("|---" * (1 + len(ENGINES) * len(columns)) + "|")
    totals = [sum((Counter(count) for count in each.values()), Counter[str]()) for each in counts]
    rows = [(name, [each[name] for each in counts]) for name in counts[0]]
    for name, row in (*rows, ("all", totals)):
        print("|", name, "|", " | ".join(cell(count, column) for count in row for column in columns), "|")


def cell(count: Counter[str], column: str) -> str:
    total = {"accepted": "schemas", "valid allowed": "valid", "invalid allowed": "invalid"}.get(column)
    return f"{count[column]} of {count[total]}" if total else str(count[column])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, metavar="FOLDER", help="a checkout of JSON-Schema-Test-Suite")
    parser.add_argument("--bench", type=Path, metavar="FOLDER", help="a checkout of jsonschemabench")
    arguments = parser.parse_args()
    print(", ".join(f"{name} {version(name)}" for name in ("mpt-grpc", "llguidance", "jsonschema")))
    for folder, measure, title, columns in (
        (arguments.suite, suite, "JSON Schema Test Suite", ("accepted", "valid allowed", "invalid allowed")),
        (arguments.bench, bench, "JSONSchemaBench", ("accepted", "valid", "invalid", "unfinished")),
    ):
        if folder is None:
            continue
        reasons = [Counter[str]() for _ in ENGINES]
        print()
        table(
            title, [measure(folder, make, each) for make, each in zip(ENGINES.values(), reasons, strict=True)], columns
        )
        for engine, each in zip(ENGINES, reasons, strict=True):
            print(
                f"\nReasons of refusals, {engine}:", *(f"{n} {reason}" for reason, n in each.most_common()), sep="\n- "
            )


if __name__ == "__main__":
    main()
