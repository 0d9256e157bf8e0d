"""`mpt-grpc generate`: sends one request and prints its text, or the complete result as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import sys
from typing import Any

from mpt_grpc.commands.connection import client_options
from mpt_grpc.commands.options import generate_options
from mpt_grpc.commands.printable import generated, print_pieces
from mpt_grpc_client import Client, GenerateOptions, Generation


def run(parsed: argparse.Namespace) -> None:
    """Sends the request and prints the result. Raises MptGrpcError if the call fails."""
    prompt = sys.stdin.read() if parsed.prompt in (None, "-") else parsed.prompt
    options = generate_options(parsed)
    with Client(parsed.target, timeout=parsed.timeout, **client_options(parsed)) as client:
        if parsed.json:
            print(json.dumps(_as_json(client.generate(prompt, **options)), ensure_ascii=False))
        elif (parsed.num_sequences or 1) > 1:
            _print_outputs(client.generate(prompt, **options))
        else:
            _print_stream(client, prompt, options)


def _print_stream(client: Client, prompt: str, options: GenerateOptions) -> None:
    with client.stream(prompt, **options) as stream:
        print_pieces(stream)


def _print_outputs(generation: Generation) -> None:
    for output in generation.outputs:
        print(f"[{output.index}]\n{generated(output.text)}")


def _as_json(value: Any) -> Any:
    """Returns a result of the client as JSON values; token bytes become text, with U+FFFD for invalid UTF-8."""
    if dataclasses.is_dataclass(value):
        return {field.name: _as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.name if isinstance(value, enum.Enum) else value
