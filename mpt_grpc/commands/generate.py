"""`mpt-grpc generate`: one request to a server; its text, or the whole answer as JSON, on standard output."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import sys
from typing import Any

from mpt_grpc.commands.options import generate_options
from mpt_grpc_client import Client, GenerateOptions, Generation


def run(parsed: argparse.Namespace) -> None:
    """Raises MptGrpcError if the call fails."""
    prompt = sys.stdin.read() if parsed.prompt in (None, "-") else parsed.prompt
    options = generate_options(parsed)
    with Client(parsed.target, timeout_s=parsed.timeout_s) as client:
        if parsed.json:
            print(json.dumps(_as_json(client.generate(prompt, **options)), ensure_ascii=False))
        elif (parsed.num_sequences or 1) > 1:
            _print_outputs(client.generate(prompt, **options))
        else:
            _print_stream(client, prompt, options)


def _print_stream(client: Client, prompt: str, options: GenerateOptions) -> None:
    with client.stream(prompt, **options) as stream:
        for piece in stream:
            print(piece, end="", flush=True)
    print()


def _print_outputs(generation: Generation) -> None:
    for output in generation.outputs:
        print(f"[{output.index}]\n{output.text}")


def _as_json(value: Any) -> Any:
    """A result of the client as JSON holds it; a token's bytes as text, what is no character as U+FFFD."""
    if dataclasses.is_dataclass(value):
        return {field.name: _as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.name if isinstance(value, enum.Enum) else value
