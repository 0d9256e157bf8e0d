"""The client library's results in OpenAI's format: complete responses, and the chunks of a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, TypeVar

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from mpt_grpc.gateway.errors import error_body
from mpt_grpc.gateway.events import DONE
from mpt_grpc_client import (
    AsyncTextStream,
    Delta,
    Finish,
    FinishReason,
    Generation,
    Output,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

Json = dict[str, Any]
_Value = TypeVar("_Value")
_Result = TypeVar("_Result")
_SENT_BYTES = 256 << 10
"""The bytes of a body that are sent at once: copying those of a large one takes the event loop milliseconds."""
_LENGTH = (FinishReason.MAX_NEW_TOKENS, FinishReason.CONTEXT_LENGTH, FinishReason.TIME_LIMIT)


def usage(usages: Iterable[Usage]) -> Json:
    """Returns the token counts of a request, summed over its prompts."""
    usages = tuple(usages)
    num_prompt = sum(usage.num_prompt_tokens for usage in usages)
    num_output = sum(usage.num_output_tokens for usage in usages)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(usage.num_cached_tokens for usage in usages)},
    }


async def built(build: Callable[[_Value], _Result], held: list[_Value], *, has_logprobs: bool) -> _Result:
    """Returns what `build` makes of the held value, in a thread if there may be many log probabilities in it.

    The thread takes the value out of the list and so frees it, which would stop the event loop for milliseconds, too.
    """
    return await asyncio.to_thread(lambda: build(held.pop())) if has_logprobs else build(held.pop())


class PartedResponse(JSONResponse):
    """A response that is encoded choice by choice or item by item, because the encoder holds Python's global lock.

    Choices that are bytes are already encoded. The body is sent in pieces.
    """

    def render(self, content: Json) -> bytes:
        name = "choices" if "choices" in content else "output"
        rest = encoded({field: value for field, value in content.items() if field != name})
        parts = (part if isinstance(part, bytes) else encoded(part) for part in content[name])
        return b'%b,"%b":[%b]}' % (rest[:-1], name.encode(), b",".join(parts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for end in range(_SENT_BYTES, len(self.body) + _SENT_BYTES, _SENT_BYTES):
            piece = self.body[end - _SENT_BYTES : end]
            await send({"type": "http.response.body", "body": piece, "more_body": end < len(self.body)})


def encoded(value: Json) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


class _Completion:
    """What the streams of chat and text completions have in common."""

    end = DONE

    def failure(self, error: Exception, names: Mapping[str, str]) -> Json:
        """Returns the last event of a stream that has begun and failed; `names` are the endpoint's for the options."""
        return error_body(error, names)[1]


class ChatResponse(_Completion):
    """Builds the response to a chat completion."""

    def __init__(self, model: str, request_id: str, *, has_logprobs: bool, includes_usage: bool) -> None:
        self._envelope = _envelope_for("chatcmpl", model, request_id)
        self._chunk_envelope = {**self._envelope, "object": "chat.completion.chunk", **_no_usage(includes_usage)}
        self._has_logprobs, self._includes_usage = has_logprobs, includes_usage

    def complete(self, generation: Generation) -> Json:
        """Returns the response for a finished generation."""
        choices = [
            {
                "index": output.index,
                "message": {"role": "assistant", "refusal": None, **_content(output)},
                "logprobs": _chat_logprobs(output.logprobs) if self._has_logprobs else None,
                "finish_reason": finish_reason(output.finish),
            }
            for output in generation.outputs
        ]
        return {**self._envelope, "object": "chat.completion", "choices": choices, "usage": usage([generation.usage])}

    async def chunks(self, begin: Callable[[], AsyncTextStream]) -> AsyncIterator[Json]:
        """Yields the chunks of the stream that `begin` returns. Raises MptGrpcError."""
        started: set[int] = set()
        async with begin() as stream:
            async for delta in stream.deltas(keep_logprobs=False):
                if delta.index not in started:
                    started.add(delta.index)
                    yield self._chunk(delta.index, {"role": "assistant", "content": ""}, None, None)
                if delta.text or delta.tool_calls or delta.logprobs or delta.finish:
                    yield self._delta_chunk(delta)
            if self._includes_usage:
                usages = usage([stream.result.usage])
                yield {**self._chunk_envelope, "choices": [], "usage": usages}

    def empty_chunk(self) -> Json:
        """Returns a chunk without content, which keeps an idle stream alive."""
        return self._chunk(0, {}, None, None)

    def _delta_chunk(self, delta: Delta) -> Json:
        logprobs = _chat_logprobs(delta.logprobs) if self._has_logprobs and delta.logprobs else None
        content: Json = {"content": delta.text} if delta.text else {}
        if delta.tool_calls:
            content["tool_calls"] = [
                {"index": part.index, **(_call(part) if part.id else {"function": {"arguments": part.arguments}})}
                for part in delta.tool_calls
            ]
        return self._chunk(delta.index, content, logprobs, delta.finish)

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, finish: Finish | None) -> Json:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": None if finish is None else finish_reason(finish),
        }
        return {**self._chunk_envelope, "choices": [choice]}


class TextResponse(_Completion):
    """Builds the response to a text completion. The choices of several prompts follow one another."""

    def __init__(self, model: str, request_id: str, *, includes_usage: bool) -> None:
        self._envelope = {**_envelope_for("cmpl", model, request_id), "object": "text_completion"}
        self._chunk_envelope = {**self._envelope, **_no_usage(includes_usage)}

    def complete(self, choices: list[bytes], usages: Iterable[Usage]) -> Json:
        """Returns the response with choices that are already encoded."""
        return {**self._envelope, "choices": choices, "usage": usage(usages)}

    def chunk(self, choice: Json) -> Json:
        return {**self._chunk_envelope, "choices": [choice]}

    def empty_chunk(self) -> Json:
        """Returns a chunk without content, which keeps an idle stream alive."""
        return self.chunk(text_choice(0, "", None, None))

    def usage_chunk(self, usages: Iterable[Usage]) -> Json:
        """Returns the last chunk of a stream with `include_usage`."""
        return {**self._envelope, "choices": [], "usage": usage(usages)}


def _no_usage(includes_usage: bool) -> Json:
    """Returns what chunks say of the usage before the last one has it, as OpenAI's do."""
    return {"usage": None} if includes_usage else {}


def text_choice(index: int, text: str, logprobs: Json | None, finish: Finish | None) -> Json:
    """Returns a choice of a text completion, or the new part of one in a chunk."""
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": None if finish is None else finish_reason(finish),
    }


def finish_reason(finish: Finish) -> str:
    """Returns OpenAI's name for the reason an output ended."""
    if finish.reason is FinishReason.CONTENT_FILTER:
        return "content_filter"
    if finish.reason is FinishReason.TOOL_CALLS:
        return "tool_calls"
    return "length" if finish.reason in _LENGTH else "stop"


def _content(output: Output) -> Json:
    if not output.tool_calls:
        return {"content": output.text}
    return {"content": output.text or None, "tool_calls": [_call(call) for call in output.tool_calls]}


def _call(call: ToolCall | ToolCallDelta) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _chat_logprobs(logprobs: Iterable[TokenLogprob]) -> Json:
    return {"content": token_logprobs(logprobs), "refusal": None}


def token_logprobs(logprobs: Iterable[TokenLogprob]) -> list[Json]:
    """Returns the log probabilities of tokens, each with its most likely alternatives."""
    return [
        {
            "token": token_label(logprob.token_bytes),
            "bytes": list(logprob.token_bytes),
            "logprob": logprob.logprob,
            "top_logprobs": [
                {"token": token_label(top.token_bytes), "bytes": list(top.token_bytes), "logprob": top.logprob}
                for top in logprob.top_logprobs
            ],
        }
        for logprob in logprobs
    ]


def token_label(token: bytes) -> str:
    """Returns the text of a token; a token that is not valid UTF-8 by itself is written as OpenAI does."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _envelope_for(prefix: str, model: str, request_id: str) -> Json:
    """Returns the fields that a response and all its chunks share."""
    return {"id": f"{prefix}-{request_id}", "created": int(time.time()), "model": model}
