"""Servers, the streams that are read from them with every kind of option, and the count of what became of these."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpt_grpc_client import (
    AsyncClient,
    Generation,
    JsonSchema,
    Message,
    Prompt,
    Regex,
    RepetitionGuard,
    Role,
    Timings,
)

MAX_NEW_TOKENS = 48
TIMEOUT_S = 120
PROMPTS: Sequence[Prompt] = (
    "Once upon a time there was a fox",
    [Message(Role.SYSTEM, "Be kind."), Message(Role.USER, "Tell me about the moon.")],
)
LOGPROBS = {"return_logprobs": True, "top_logprobs": 3, "return_prompt_logprobs": True}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 20, "maxLength": 40}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
KINDS: Sequence[Mapping[str, Any]] = (
    {"temperature": 0},
    {"top_k": 200, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.95},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    {"return_token_ids": True, "return_prompt_token_ids": True, **LOGPROBS},
    {"logit_bias": {50: 5.0, 60: -100.0}, "chunk_tokens": 7},
    {"allowed_token_ids": range(130, 250)},  # most are parts of characters
    {"stop_strings": [" the fox and", "the k"], "include_stop_string": True, "min_new_tokens": 30},
    {"stop_strings": ["\n\n\n", "zebra"]},
    {"stop_token_ids": range(64), "min_new_tokens": 40},
    {"repetition_guard": RepetitionGuard(20, 4), "temperature": 0},
    {"constraint": JsonSchema(PERSON), "ignore_eos": None},
    {"constraint": Regex("[a-z]{30,60}( [0-9]{8})+"), "ignore_eos": None},
    {"num_sequences": 4, "ignore_eos": None, **LOGPROBS},
    {"num_sequences": 2, "constraint": JsonSchema(PERSON), "ignore_eos": None},
    {"resume_token_ids": [50, 60, 70], "skip_special_tokens": False, "cache_bypass": True},
)


@dataclass
class Tally:
    """What happened under one fault or load."""

    num_rounds: int = 0
    num_calls: int = 0
    num_lost: int = 0
    """Calls that failed or differ."""
    pauses_s: list[float] = field(default_factory=list)
    """How long it took to recover, each time: until another server went on with a stream, or, after a load, until a new
    stream began."""


class ServerProcess:
    """A server that can be started again at the same port."""

    def __init__(self, *flags: str) -> None:
        self.port, self._flags = 0, flags
        self.start()

    def start(self, *more_flags: str, **variables: str) -> None:
        command = (
            "serve",
            "--grpc-port",
            str(self.port),
            "--no-http",
            "--kv-cache",
            "256MiB",
            "--grace",
            "0s",
            *self._flags,
            *more_flags,
        )
        self.process = subprocess.Popen(
            (sys.executable, "-m", "mpt_grpc", *command),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | variables,
        )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if address := re.match(r"\s+gRPC\s+\S+:(\d+)", line):
                self.port = int(address[1])
                return
        raise SystemExit(f"a server did not start: status {self.process.wait()}")

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def request(number: int) -> tuple[Prompt, dict[str, Any]]:
    """Returns the prompt and the options of a stream."""
    options = {"max_new_tokens": MAX_NEW_TOKENS, "ignore_eos": True, "seed": number, **KINDS[number % len(KINDS)]}
    return PROMPTS[number // len(KINDS) % len(PROMPTS)], options


def essence(generation: Generation) -> Generation:
    """Returns what must not differ: all but IDs, times and what the prefix cache had."""
    usage = replace(generation.usage, num_cached_tokens=0, num_preemptions=0)
    timings = Timings(None, None, None, None)
    return replace(generation, request_id="", trace_id="", usage=usage, timings=timings, resumptions=())


async def read(client: AsyncClient, number: int, tally: Tally, on_delta: Callable[[], None]) -> Generation:
    """Returns a stream's result, and adds the reader's pauses to the tally."""
    prompt, options = request(number)
    stream, last_s, num_resumptions = client.stream(prompt, **options), time.monotonic(), 0
    async for _ in stream.deltas():
        on_delta()
        now_s = time.monotonic()
        if len(stream.resumptions) > num_resumptions:
            num_resumptions += 1
            tally.pauses_s.append(now_s - last_s)
        last_s = now_s
    return stream.result


async def undisturbed(client: AsyncClient, num_streams: int) -> list[Generation]:
    """Returns what the streams are without a fault and without a load."""
    requests = map(request, range(num_streams))
    whole = await asyncio.gather(*(client.generate(prompt, **options) for prompt, options in requests))
    return [essence(generation) for generation in whole]
