"""Any server with OpenAI's API. Its messages have no number of tokens, which comes from the stream's usage."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from time import perf_counter
from typing import Any

from mpt_grpc.bench.endpoint import Answer, Prompt, RequestFailedError
from mpt_grpc.bench.http_client import HttpClient, HttpResponse
from mpt_grpc.errors import BenchmarkError

_WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which"
    " one you were all her she there would their we him been has when who will no more if out so up said what its about"
    " than into them can only other time new some could these two may first then do any like my now over such our man"
    " me even most made after also well did many must years where much before back way day world house water old great"
).split()
"""Words that most tokenizers encode as one token each, with the space before them."""

_UNEXPECTED = (ValueError, LookupError, TypeError, AttributeError)
"""What the reading of JSON of another shape raises."""


class HttpEndpoint:
    """Prompts are random token IDs where the server tokenizes in vLLM's format, and random words elsewhere."""

    def __init__(self, client: HttpClient, model: str, *, is_chat: bool) -> None:
        self._client, self.model, self._is_chat = client, model, is_chat
        self.max_context_tokens: int | None = None
        self._token_ids: list[int] = []
        self._ignore_eos: dict[str, bool] = {}

    async def prepare(self) -> None:
        """Finds out which prompts and options the server accepts. Raises BenchmarkError if it accepts none."""
        known = [] if self._is_chat else await self._known_token_ids()
        for self._token_ids, self._ignore_eos in itertools.product((known, []), ({"ignore_eos": True}, {})):
            if (refusal := await self._refusal()) is None:
                return
        raise BenchmarkError(f"--url: the server refuses a request: {refusal}")

    @property
    def prompts(self) -> str:
        return "token IDs" if self._token_ids else "words"

    def prompt(self, num_tokens: int, random: Random) -> Prompt:
        if self._token_ids:
            return random.choices(self._token_ids, k=num_tokens)
        return " ".join(random.choices(_WORDS, k=num_tokens))

    async def send(self, prompt: Prompt, num_output_tokens: int) -> Answer:
        body = json.dumps(self._body(prompt, num_output_tokens)).encode()
        path = "chat/completions" if self._is_chat else "completions"
        times_s: list[float] = []
        usage: dict[str, int] | None = None
        try:
            async with self._client.request("POST", path, body) as response:
                if response.status != 200:
                    raise RequestFailedError(str(response.status), _message(await response.content()))
                async for time_s, event in _events(response):
                    if error := event.get("error"):
                        raise RequestFailedError("error in the stream", str(error))
                    if _has_text(event) or (not times_s and _has_ended(event)):
                        times_s.append(time_s)
                    usage = event.get("usage") or usage
            if not times_s or usage is None:
                raise RequestFailedError("no usage in the stream" if times_s else "no output in the stream")
            num_tokens = usage["completion_tokens"]
            return Answer(tuple(times_s), _shared_out(num_tokens, len(times_s)), usage["prompt_tokens"], num_tokens)
        except OSError as error:
            raise RequestFailedError("connection lost", str(error)) from error
        except _UNEXPECTED as error:
            raise RequestFailedError("invalid stream", str(error)) from error

    def _body(self, prompt: Prompt, num_output_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            **({"messages": [{"role": "user", "content": prompt}]} if self._is_chat else {"prompt": prompt}),
            "max_tokens": num_output_tokens,
            **self._ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _refusal(self) -> str | None:
        """Returns why the server refuses a small request, if it does."""
        try:
            await self.send(self.prompt(4, Random()), 2)
        except RequestFailedError as error:
            return str(error)
        return None

    async def _known_token_ids(self) -> list[int]:
        """Returns token IDs of the server's vocabulary; empty if it does not tokenize in vLLM's format."""
        body = json.dumps({"model": self.model, "prompt": " ".join(_WORDS)}).encode()
        async with self._client.request("POST", "/tokenize", body) as response:
            try:
                return sorted(set(json.loads(await response.content())["tokens"]))
            except _UNEXPECTED:
                return []


@asynccontextmanager
async def open_http(url: str, *, is_chat: bool) -> AsyncIterator[HttpEndpoint]:
    """Connects to a server and takes the first of its models. Raises BenchmarkError."""
    try:
        client = HttpClient(url)
    except ValueError as error:
        raise BenchmarkError(f"--url: {error}") from error
    async with client:
        try:
            async with client.request("GET", "models") as response:
                model = json.loads(await response.content())["data"][0]
            endpoint = HttpEndpoint(client, model["id"], is_chat=is_chat)
            endpoint.max_context_tokens = model.get("max_model_len")
            await endpoint.prepare()
        except (OSError, *_UNEXPECTED) as error:
            why = getattr(error, "strerror", None) or error
            raise BenchmarkError(f"--url: no server with OpenAI's API responds at {url}: {why}") from error
        yield endpoint


async def _events(response: HttpResponse) -> AsyncIterator[tuple[float, dict[str, Any]]]:
    """Yields the server-sent events of a stream, with the time at which each arrived."""
    rest = b""
    async for piece in response.pieces():
        time_s = perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                yield time_s, json.loads(data)


def _has_text(event: dict[str, Any]) -> bool:
    return any(choice.get("text") or choice.get("delta", {}).get("content") for choice in event.get("choices", ()))


def _has_ended(event: dict[str, Any]) -> bool:
    return any(choice.get("finish_reason") for choice in event.get("choices", ()))


def _shared_out(num_tokens: int, num_messages: int) -> tuple[int, ...]:
    """Returns a number of tokens for each message: one for the first, the others equally for the rest."""
    rest, others = max(num_tokens - 1, 0), num_messages - 1
    return (1, *((number + 1) * rest // others - number * rest // others for number in range(others)))


def _message(content: bytes) -> str:
    """Returns the message of an error in OpenAI's format, or the beginning of another response."""
    try:
        error = json.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except _UNEXPECTED:
        return content[:200].decode(errors="replace")
